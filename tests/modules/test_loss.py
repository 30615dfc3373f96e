"""The chunked losses against F.cross_entropy over the full logits: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.adapters.lora import LoRALinear
from modules.loss import linear_cross_entropy, linear_logprobs
from modules.quantization.nf4 import NF4Linear

D, V = 16, 40


def make_head(kind: str, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=kind == "bias", dtype=dtype)
    if kind == "frozen":
        head.requires_grad_(False)
    if kind == "nf4":
        head = NF4Linear.from_linear(head)
    if kind in ("lora", "lora on nf4"):
        head = NF4Linear.from_linear(head) if "nf4" in kind else head
        head = LoRALinear(head, 4, 8.0, 0.0, dtype)
        nn.init.normal_(head.lora_B.weight)
    return head


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 9, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (3, 9), generator=generator)
    targets[0, :4] = targets[2] = -100
    return hidden, targets


def gradients(loss, hidden, head):
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("kind", ["plain", "bias", "frozen", "nf4", "lora", "lora on nf4"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_equals_the_full_logits(kind, chunk):
    head, (hidden, targets) = make_head(kind), inputs()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    loss = linear_cross_entropy(hidden, head, targets, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients(3 * loss, hidden, head), gradients(3 * expected, hidden, head), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    logprobs = linear_logprobs(hidden, head, targets, chunk=chunk)
    want = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(3, 9)
    torch.testing.assert_close(-logprobs, want)
    weights = torch.randn(3, 9)
    got, want = ((logprobs * weights).sum(), (-want * weights).sum())
    for g, w in zip(gradients(got, hidden, head), gradients(want, hidden, head), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_index_names_the_same_positions():
    head, (hidden, targets) = make_head("plain"), inputs()
    index = (targets.flatten() != -100).nonzero().squeeze(1)
    by_index = linear_cross_entropy(hidden, head, targets.flatten()[index], index=index)
    assert torch.equal(by_index, linear_cross_entropy(hidden, head, targets))


def test_no_target_at_all_is_a_zero_that_backward_accepts():
    head, (hidden, targets) = make_head("plain"), inputs()
    for function in (linear_cross_entropy, lambda *a: linear_logprobs(*a).sum()):
        loss = function(hidden, head, torch.full_like(targets, -100))
        assert loss.item() == 0
        assert all(not g.any() for g in gradients(loss, hidden, head))


def test_without_gradients():
    head, (hidden, targets) = make_head("plain"), inputs()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, targets).requires_grad
        want = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
        torch.testing.assert_close(linear_cross_entropy(hidden, head, targets), want)


@pytest.mark.parametrize("kind", ["plain", "bias", "lora"])
def test_gradcheck_in_float64(kind):
    head, (hidden, targets) = make_head(kind, torch.float64), inputs(torch.float64)
    parameters = [p for p in head.parameters() if p.requires_grad]

    for function in (linear_cross_entropy, linear_logprobs):

        def loss(hidden, *_, function=function):
            return function(hidden, head, targets, chunk=4)

        assert torch.autograd.gradcheck(loss, (hidden, *parameters), fast_mode=True)


def test_dropout_in_the_head_repeats_itself_in_backward():
    head, (hidden, targets) = make_head("lora", torch.float64), inputs(torch.float64)
    head.dropout.p = 0.5
    torch.manual_seed(5)
    got = gradients(linear_logprobs(hidden, head, targets, chunk=100).sum(), hidden, head)
    torch.manual_seed(5)
    got_ce = gradients(-linear_cross_entropy(hidden, head, targets, chunk=100), hidden, head)
    for a, b in zip(got, got_ce, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_is_summed_in_float32():
    head, (hidden, targets) = make_head("plain", torch.bfloat16), inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, head, targets)
    assert loss.dtype == torch.float32
    want = F.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)


def test_unknown_heads_and_shapes_are_errors():
    hidden, targets = inputs()
    with pytest.raises(ValueError, match="Sequential"):
        linear_cross_entropy(hidden, nn.Sequential(nn.Linear(D, V)), targets)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, make_head("plain"), targets[:, 1:])
