"""Which device `auto` takes, and that memory figures come from the right place."""

from unittest import mock

import pytest
import torch

from modules.device import describe_device, peak_memory_gib, pick_device, pick_dtype


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device_that_there_is(cuda: bool, mps: bool, expected: str):
    with (
        mock.patch("torch.cuda.is_available", lambda: cuda),
        mock.patch("torch.backends.mps.is_available", lambda: mps),
    ):
        assert pick_device("auto").type == expected


def test_apples_gpu_has_figures_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 3 * 2**29)
    device = torch.device("mps")
    assert pick_dtype("auto", device) == torch.float32
    assert peak_memory_gib(device) == 1.5 and describe_device(device, torch.float32).endswith("(mps), float32")


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_the_memory_of_the_process_is_read_in_its_unit(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("resource.getrusage", lambda _: mock.Mock(ru_maxrss=2**31 // unit))
    assert peak_memory_gib(torch.device("cpu")) == 2.0


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="--device xyz is not available here"):
        pick_device("xyz")
