"""AdamW with its moments in host memory: PyTorch's AdamW, chunk by chunk, with nothing left on the card."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from checkpointing.training_state import save_training_state
from modules.memory.optim_host import BUFFERS, HostAdamW
from modules.optim import StochasticRoundingAdamW

SHAPES = [(5, 7), (11,), (), (3, 2, 4), (16,)]


def random_parameters(dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]


def take_steps(optimizer: torch.optim.Optimizer, steps: int, skip: int | None = None) -> None:
    """Steps of random gradients at a changing learning rate; parameter number `skip` has none in every second."""
    for step in range(steps):
        torch.manual_seed(step)
        i = 0
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
            for p in group["params"]:
                grad = torch.randn(p.shape, device=p.device).to(p.dtype)
                p.grad = None if i == skip and step % 2 else grad
                i += 1
                if p.is_cuda and step % 3:  # a device that lags behind shows what is not ordered by events
                    torch.cuda._sleep(3_000_000)
        torch.manual_seed(step)
        optimizer.step()


def groups_of(parameters: list[nn.Parameter]) -> list[dict]:
    return [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_float32_is_adamw(chunk):
    ours, theirs = random_parameters(), random_parameters()
    take_steps(HostAdamW(groups_of(ours), lr=1e-2, chunk=chunk), 20, skip=1)
    take_steps(torch.optim.AdamW(groups_of(theirs), lr=1e-2), 20, skip=1)
    for a, b, start in zip(ours, theirs, random_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (a - start).abs().mean() > 1e-3


def test_bfloat16_is_rounded_stochastically_by_the_same_arithmetic():
    """One chunk draws the same random numbers as StochasticRoundingAdamW: equal bits."""
    ours, theirs = random_parameters(torch.bfloat16), random_parameters(torch.bfloat16)
    take_steps(HostAdamW(groups_of(ours), lr=1e-2), 20)
    take_steps(StochasticRoundingAdamW(groups_of(theirs), lr=1e-2), 20)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [[(3000, 1000), (7,)], [(400, 1000), (5,)], [(400, 1000)]])
def test_on_cuda_it_is_adamw(shapes):
    """Parameters of 8 chunks and of 1, and so few chunks that one is back on the card before its buffer is reused."""
    ours, theirs = random_parameters(device="cuda", shapes=shapes), random_parameters(device="cuda", shapes=shapes)
    optimizer = HostAdamW([{"params": ours, "weight_decay": 0.1}], lr=1e-2, chunk=400_000)
    take_steps(optimizer, 10)
    reference = torch.optim.AdamW([{"params": theirs, "weight_decay": 0.1}], lr=1e-2)
    take_steps(reference, 10)
    torch.cuda.synchronize()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[a][name]
            assert moment.device.type == "cpu" and moment.is_pinned()
            torch.testing.assert_close(moment, reference.state[b][name].cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_checkpoint_waits_for_moments_on_their_way_home(tmp_path: Path):
    weight = nn.Parameter(torch.zeros(1000, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = HostAdamW([weight], lr=1e-2)
    with torch.cuda.stream(optimizer.card.download):
        torch.cuda._sleep(1_000_000_000)  # half a second
    optimizer.step()
    save_training_state(tmp_path / "s", parameters={"w": weight}, optimizer=optimizer, progress={})
    moments = load_file(tmp_path / "s" / "optimizer.safetensors")
    torch.testing.assert_close(moments["exp_avg:w"], torch.full((1000,), 0.1))


@pytest.mark.gpu
def test_the_card_holds_a_few_chunks():
    weight = nn.Parameter(torch.randn(64 << 20, device="cuda", dtype=torch.bfloat16))
    weight.grad = torch.randn_like(weight)
    chunk = 1 << 20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    optimizer = HostAdamW([weight], lr=1e-3, chunk=chunk)
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    peak = torch.cuda.max_memory_allocated() - before
    # the buffers of both moments, and the temporaries of one chunk; all moments would be 128 chunks
    assert (2 * BUFFERS + 4) * 4 * chunk <= peak <= (2 * BUFFERS + 8) * 4 * chunk
