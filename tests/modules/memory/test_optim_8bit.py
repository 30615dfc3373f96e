"""AdamW with 8-bit moments: close to AdamW, at a quarter of the state, and used like any other optimizer."""

import pytest
import torch
from torch import nn

from modules.memory import optim_8bit
from modules.memory.optim_8bit import AdamW8bit
from modules.memory.plan import storage_bytes
from modules.optim import build_optimizer


def fit(name: str, dtype: torch.dtype, steps: int = 60) -> list[float]:
    """The losses of a small regression whose matrices are large enough to have quantised moments."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 64)
    targets = torch.tanh(inputs @ torch.randn(64, 64) / 8)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)
    optimizer = build_optimizer(name, dict(model.named_parameters()), lr=1e-2, weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        loss = (model(inputs.to(dtype)).float() - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_adamw(dtype):
    exact, quantised = fit("adamw", dtype), fit("adamw-8bit", dtype)
    assert exact[-1] < 0.05 * exact[0]
    assert quantised != exact
    assert quantised == pytest.approx(exact, rel=0.01)


def test_state_takes_two_bytes_per_parameter():
    weight = nn.Parameter(torch.randn(256, 1024).bfloat16())
    optimizer = build_optimizer("adamw-8bit", {"w": weight}, lr=1e-3, weight_decay=0.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    size = sum(storage_bytes(state[name]) for name in ("exp_avg", "exp_avg_sq"))
    # 1 byte per number and moment, a float32 per 256 of them, and 256 levels
    assert size == 2 * (weight.numel() + weight.numel() // 256 * 4 + 256 * 4)


@pytest.mark.parametrize("shape", [(65, 64), (96, 64), (1000, 5)])  # with a remainder, without, and not quantised
def test_parts_of_a_parameter_are_updated_as_the_whole(shape, monkeypatch):
    weights = []
    for part in (2**24, 512):
        monkeypatch.setattr(optim_8bit, "PART", part)
        generator = torch.Generator().manual_seed(0)
        weights.append(nn.Parameter(torch.randn(shape, generator=generator)))
        optimizer = build_optimizer("adamw-8bit", {"w": weights[-1]}, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            weights[-1].grad = torch.randn(shape, generator=generator)
            optimizer.step()
    assert torch.equal(*weights)


def test_what_is_not_quantised_is_float32():
    """A norm's v moves by a thousandth per step: in bfloat16 it would stand still half-way."""
    scale = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = build_optimizer("adamw-8bit", {"scale": scale}, lr=1e-3, weight_decay=0.0)
    for _ in range(3000):
        scale.grad = torch.ones_like(scale)
        optimizer.step()
    moment = optimizer.state[scale]["exp_avg_sq"]
    assert moment.dtype == torch.float32
    torch.testing.assert_close(moment, torch.full((64,), 1 - 0.999**3000))


def test_the_learning_rate_is_a_number_that_acts():
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW8bit([{"params": [weight], "weight_decay": 0.0}], lr=2e-5)
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 2e-5
    for lr in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == lr
        torch.testing.assert_close(before - weight.detach(), torch.full((64, 64), lr), rtol=0.02, atol=0)


@pytest.mark.gpu
def test_a_new_learning_rate_compiles_nothing():
    weight = nn.Parameter(torch.zeros(64, 64, device="cuda"))
    optimizer = AdamW8bit([weight], lr=1.0)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert counters["unique_graphs"] == before + 1
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, -0.1 * 137 / 60), rtol=0.02, atol=0)
