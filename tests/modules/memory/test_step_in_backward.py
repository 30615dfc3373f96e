"""Updating weights inside backward changes no number; what it cannot be combined with is refused."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from checkpointing.training_state import load_training_state, save_training_state
from modules.memory.step_in_backward import step_in_backward
from modules.optim import OPTIMIZERS, build_optimizer

POSSIBLE = dict(grad_accum=1, max_grad_norm=0.0, dtype=torch.float32)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Tiny(nn.Module):
    """An embedding that is the head, too, around two matrices, one large enough for 8-bit moments."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.inner = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(3, 3)
        self.to(device, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        return self.head(hidden + self.inner(hidden))


def train(model: Tiny, optimizer, steps: int, grad_norm=None) -> tuple[list[float], list[float]]:
    """Losses and gradient norms; with `grad_norm` the weights are updated in backward."""
    losses, norms = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        ids = torch.randint(0, 64, (32,)).to(model.head.weight.device)
        loss = nn.functional.cross_entropy(model(ids).float(), (ids + 1) % 64)
        loss.backward()
        norm = grad_norm() if grad_norm else clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


def make(name: str, seed: int = 0, dtype=torch.float32, device: str = "cpu"):
    torch.manual_seed(seed)
    model = Tiny(dtype, device)
    parameters = dict(model.named_parameters())
    return model, parameters, build_optimizer(name, parameters, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_ordinary_step_bit_for_bit(name, device):
    model, parameters, optimizer = make(name, device=device)
    expected, expected_norms = train(model, optimizer, 8)
    other, other_parameters, optimizer = make(name, device=device)
    losses, norms = train(other, optimizer, 8, step_in_backward(optimizer, **POSSIBLE))
    assert losses == expected and len(set(losses)) == 8
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    for key, parameter in parameters.items():
        assert torch.equal(parameter, other_parameters[key]), key


def test_a_tied_weight_is_updated_once_with_its_whole_gradient():
    """The numbers are checked above; this counts."""
    model, _, optimizer = make("adamw")
    step_in_backward(optimizer, **POSSIBLE)
    model(torch.arange(8)).square().mean().backward()
    assert optimizer.state[model.embedding.weight]["step"].item() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_gradient_lives_at_a_time(name):
    model, parameters, optimizer = make(name)
    alive = []
    for parameter in parameters.values():  # before the hooks that update
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters.values()))
        )
    step_in_backward(optimizer, **POSSIBLE)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    model(torch.arange(8)).square().mean().backward()
    assert alive == [1] * 6
    assert all(p.grad is None for p in parameters.values())
    for key, parameter in parameters.items():
        assert torch.equal(parameter, before[key]) == key.startswith("unused"), key


def test_the_norm_is_that_of_the_passes_since_it_was_asked_for():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    grad_norm = step_in_backward(optimizer, **POSSIBLE)
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    assert grad_norm().item() == 5.0
    (weight * torch.tensor([0.0, 2.0])).sum().backward()
    assert grad_norm().item() == 2.0
    assert weight.tolist() == [-3.0, -6.0]


def test_model_and_optimizer_can_be_freed():
    model, parameters, optimizer = make("adamw-host")
    train(model, optimizer, 1, step_in_backward(optimizer, **POSSIBLE))
    left = [weakref.ref(x) for x in (optimizer, *parameters.values())]
    del model, parameters, optimizer
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_interrupted_training_equals_uninterrupted(name, dtype, in_backward, device, tmp_path: Path):
    def start(seed: int):
        model, parameters, optimizer = make(name, seed, dtype, device)
        return model, parameters, optimizer, step_in_backward(optimizer, **POSSIBLE) if in_backward else None

    model, parameters, optimizer, grad_norm = start(0)
    train(model, optimizer, 3, grad_norm)
    save_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer, progress={"step": 3})
    expected = train(model, optimizer, 3, grad_norm)
    resumed, resumed_parameters, optimizer, grad_norm = start(1)
    load_training_state(tmp_path / "s", parameters=resumed_parameters, optimizer=optimizer)
    assert train(resumed, optimizer, 3, grad_norm) == expected
    for key, parameter in parameters.items():
        assert torch.equal(parameter, resumed_parameters[key]), key
    if name == "adamw-host" and device == "cuda":
        assert all(state["exp_avg"].is_pinned() for state in optimizer.state.values())


@pytest.mark.parametrize(
    "change, fix",
    [
        (dict(grad_accum=4), "--grad-accum 4 .* use --grad-accum 1"),
        (dict(max_grad_norm=1.0), "--max-grad-norm 1 cannot .* use --max-grad-norm 0"),
        (dict(dtype=torch.float16), "use --dtype bfloat16 or float32"),
    ],
)
def test_what_cannot_work_is_refused(change, fix):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(ValueError, match=fix):
        step_in_backward(optimizer, **POSSIBLE | change)
    weight.sum().backward()
    assert weight.tolist() == [1.0, 1.0] and weight.grad is not None


def test_a_step_without_gradients_has_norm_zero():
    """Rows without an image, where only what sees is trained."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    grad_norm = step_in_backward(optimizer, **POSSIBLE)
    assert grad_norm() == 0
    weight.sum().backward()
    assert grad_norm() == pytest.approx(2**0.5) and grad_norm() == 0


@pytest.mark.gpu
def test_gradients_take_no_memory_on_cuda():
    """Twelve layers of 16 MiB: their gradients together would be 192 MiB."""
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12))).cuda()
    optimizer = build_optimizer("adamw", dict(model.named_parameters()), lr=1e-3, weight_decay=0.0)
    step_in_backward(optimizer, **POSSIBLE)
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(torch.randn(1, 2048, device="cuda")).sum().backward()
    assert (torch.cuda.max_memory_allocated() - before) / 2**20 < 3 * 16
