"""Schedules against transformers', and AdamW for bfloat16 weights against PyTorch's in float32."""

import sys

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from modules.adamw import StochasticRoundingAdamW, stochastic_round
from modules.optim import OPTIMIZERS, build_optimizer, learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(schedule, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(12):
        ours = learning_rate(step, peak=0.5, schedule=schedule, warmup_steps=warmup, total_steps=10)
        if step < 10:
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_vectors_do_not(name):
    parameters = {"weight": nn.Parameter(torch.ones(2, 2)), "bias": nn.Parameter(torch.ones(2))}
    optimizer = build_optimizer(name, parameters, lr=0.1, weight_decay=0.5)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(parameters["weight"], torch.full((2, 2), 0.95))
    assert torch.equal(parameters["bias"].data, torch.ones(2))


def test_which_optimizer():
    wide, narrow = ({"w": nn.Parameter(torch.ones(2, 2, dtype=dtype))} for dtype in (torch.float32, torch.bfloat16))
    settings = dict(lr=0.1, weight_decay=0.0)
    optimizer = build_optimizer("adamw", wide, **settings)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert type(build_optimizer("adamw", narrow, **settings)) is StochasticRoundingAdamW
    with pytest.raises(ValueError, match="--optimizer 'adam' is not one of adamw, adamw-8bit, adamw-host"):
        build_optimizer("adam", wide, **settings)


@pytest.mark.parametrize("lr", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_that_are_none(name, lr):
    with pytest.raises(ValueError, match=f"--lr {lr} must be a positive number"):
        build_optimizer(name, {"w": nn.Parameter(torch.ones(2, 2))}, lr=lr, weight_decay=0.0)


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in ("modules.memory.optim_8bit", "modules.quantization.torchao_parts"):
        monkeypatch.delattr(name, raising=False)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match="--optimizer adamw-8bit: .* need torchao 0.17 or 0.18.*pip install"):
        build_optimizer("adamw-8bit", {"w": nn.Parameter(torch.ones(2, 2))}, lr=0.1, weight_decay=0.0)


def test_float32_arithmetic_is_adamw():
    """Our update on float32 weights (where nothing is rounded) is torch.optim.AdamW's."""
    torch.manual_seed(0)
    start = torch.randn(5, 7)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = dict(lr=0.01, weight_decay=0.1)
    optimizers = StochasticRoundingAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(10):
        ours.grad = torch.randn(5, 7)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_stochastic_rounding_is_right_on_average():
    torch.manual_seed(0)
    x = torch.tensor([1.0 + 1 / 1024, -3.001, 1e-30, 0.0, 5.0])
    drawn = torch.stack([stochastic_round(x).float() for _ in range(4000)])
    resolution = x.abs() * 2**-7
    assert ((drawn - x).abs() <= resolution).all()
    assert ((drawn.mean(0) - x).abs() <= 0.05 * resolution).all()
    assert (drawn[:, 3:] == x[3:]).all()  # what bfloat16 can hold stays


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_steps_are_not_lost_in_bfloat16(name):
    """Steps of a thousandth of the resolution: rounding to nearest would stand still."""
    torch.manual_seed(0)
    weight, steps = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16)), 200 if "8bit" in name else 1000
    optimizer = build_optimizer(name, {"w": weight}, lr=1e-5, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 1e-5 * steps, abs=0.0005)
