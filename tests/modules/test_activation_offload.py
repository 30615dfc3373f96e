"""What is put comes back, and host memory is used again. CUDA's streams are stood in for; the copies are real."""

import contextlib
import gc

import pytest
import torch

from modules import activation_offload
from modules.activation_offload import ActivationOffload


class Stream:
    """Everything asked of it has already happened."""

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        assert event == "done"

    def record_event(self):
        return "done"


@pytest.fixture
def offload(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(activation_offload, "PIECE", 64)
    monkeypatch.setattr(activation_offload, "PIECES_AT_A_TIME", 3)
    offload = ActivationOffload(torch.device("cpu"))
    offload.side = Stream()
    return offload


def test_a_step_and_another(offload):
    for step in range(3):
        tensors = [torch.randn(2, 5 + step, 7).to(torch.bfloat16) for _ in range(4)]
        items = [offload.put(tensor.clone()) for tensor in tensors]
        # The last one stays, the others have left.
        assert [item.resident is not None for item in items] == [False, False, False, True]
        for i in reversed(range(4)):
            got = offload.get(items[i])
            assert torch.equal(got, tensors[i]) and got.dtype == torch.bfloat16
            if i:
                assert items[i - 1].resident is not None  # already on its way
        used = 4 * -(-(2 * (5 + step) * 7 * 2) // 64)
        assert len(offload.spare) * 64 == offload.host_bytes == -(-used // 3) * 3 * 64
        assert not offload._last()


def test_a_dropped_graph_gives_its_memory_back(offload):
    items = [offload.put(torch.randn(40)) for _ in range(3)]
    kept = items[0]
    del items
    gc.collect()
    assert len(offload.spare) * 64 == offload.host_bytes - 3 * 64
    offload.put(torch.randn(40))
    assert offload.get(kept).shape == (40,)
    with pytest.raises(RuntimeError, match="one backward only"):
        offload.get(kept)


def test_on_a_cpu_nothing_moves():
    offload = ActivationOffload(torch.device("cpu"))
    tensor = torch.randn(3)
    item = offload.put(tensor)
    assert offload.get(item).data_ptr() == tensor.data_ptr() and offload.host_bytes == 0
