"""The chunked losses against autograd over the full logits: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.batches import Batch
from models.llama import LlamaConfig, LlamaForCausalLM
from models.vision_language import VisionLanguageModel
from modules.adapters.lora import LoRALinear
from modules.attention import padded_layout
from modules.evaluation import evaluate_loss
from modules.generation import generate
from modules.loss import by_autograd, linear_cross_entropy, linear_logprobs, linear_loss
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
    head = make_head("plain")
    with pytest.raises(ValueError, match="Sequential"):
        linear_cross_entropy(hidden, nn.Sequential(nn.Linear(D, V)), targets)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, head, targets[:, 1:])
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, edited(lambda model, x: x.T), targets)
    hidden_ND = hidden.flatten(0, 1)
    with pytest.raises(ValueError, match="27 entries without gradient"):
        linear_loss(hidden_ND, head, by_autograd(focal), targets.flatten()[1:])
    with pytest.raises(ValueError, match="27 entries without gradient"):
        linear_loss(hidden_ND, head, by_autograd(lambda x, h: (x * h.sum()).sum()), hidden_ND)
    with pytest.raises(ValueError, match="uses a trained tensor"):
        linear_loss(hidden_ND, head, by_autograd(lambda x: (x * head.weight.sum()).sum()))
    with pytest.raises(RuntimeError, match="scalar"):
        linear_loss(hidden_ND, head, by_autograd(lambda x: x.sum(1)))


CONFIG = LlamaConfig.from_dict(
    dict(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
)
EDITS = {
    "soft cap": lambda model, x: 2 * torch.tanh(x / 2),
    "scaling": lambda model, x: x / 8,
    "bias": lambda model, x: x + model.extra,
    "learned temperature": lambda model, x: x * model.extra.mean().exp(),
    "a function that reads its output in backward": lambda model, x: torch.tanh(x),
    "a view of what such a function returned": lambda model, x: torch.tanh(x).view(x.shape),
    "log-softmax": lambda model, x: x.log_softmax(-1),
    "padded rows cut off": lambda model, x: x[..., : V - 3],
    "more logits": lambda model, x: torch.cat([x, x * model.extra], dim=-1),
    "float32": lambda model, x: x.float().double(),
}


def edited(edit, dtype=torch.float32):
    """A Llama as a fork might have it, whose `logits` do more; with an adapted head."""

    class Edited(LlamaForCausalLM):
        def logits(self, hidden):
            return edit(self, self.head(hidden))

    torch.manual_seed(2)
    model = Edited(CONFIG).to(dtype)
    model.lm_head = make_head("lora", dtype)
    model.extra = nn.Parameter(torch.randn(V, dtype=dtype))
    return model


@pytest.mark.parametrize("edit", EDITS)
def test_what_a_fork_does_to_logits_reaches_everything(edit):
    model, (_, targets) = edited(EDITS[edit], torch.float64), inputs()
    targets = targets.clamp(max=V - 4)
    ids = torch.randint(0, V, targets.shape, generator=torch.Generator().manual_seed(3))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def same(got, want):
        grads = [torch.autograd.grad(x, parameters, allow_unused=True, retain_graph=True) for x in (got, want)]
        torch.testing.assert_close((got, *grads[0]), (want, *grads[1]), rtol=1e-6, atol=1e-6)

    whole = model.logits(model(ids))
    nll = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none")
    same(linear_cross_entropy(model(ids), model, targets, chunk=4), nll.sum())
    same(linear_logprobs(model(ids), model, targets, chunk=4).square().sum(), nll.square().sum())

    index = (targets.flatten() >= 0).nonzero().squeeze(1)
    batch = Batch(ids, padded_layout(9), index, targets.flatten()[index])
    loss, tokens = evaluate_loss(model, [batch], torch.device("cpu"), torch.float64)
    assert tokens == len(index) and abs(loss - nll.sum() / tokens) < 1e-6
    squares = evaluate_loss(model, [batch], torch.device("cpu"), torch.float64, loss_fn=squared_logprobs)[0]
    assert abs(squares - nll.square().sum() / tokens) < 1e-6

    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
    likely = torch.softmax(whole[:, -1].float(), -1)
    new = generate(model, ids.tolist(), max_new_tokens=1, temperature=1.0, generator=seeds[0])
    assert torch.equal(torch.tensor(new), torch.multinomial(likely, 1, generator=seeds[1]))


def squared_logprobs(hidden, model, targets, *, index):
    return linear_logprobs(hidden, model, targets, index=index).square().sum()


def test_a_model_that_sees_has_the_logits_of_a_llama():
    assert VisionLanguageModel.logits is LlamaForCausalLM.logits and VisionLanguageModel.head is LlamaForCausalLM.head


# Losses of a recipe's own, each as a fork would write it.


def focal(logits_CV, targets_C):
    logp_C = -F.cross_entropy(logits_CV, targets_C, reduction="none")
    return -((1 - logp_C.exp()) ** 2 * logp_C).sum()


def smoothed(logits_CV, targets_C):
    return F.cross_entropy(logits_CV, targets_C, reduction="sum", label_smoothing=0.1)


def with_z_loss(logits_CV, targets_C):
    return F.cross_entropy(logits_CV, targets_C, reduction="sum") + 1e-2 * logits_CV.logsumexp(-1).square().sum()


def distilled(teacher, temperature=2.0):
    def loss_fn(logits_CV, teacher_CD):
        with torch.no_grad():
            teacher_CV = (teacher(teacher_CD) / temperature).log_softmax(-1)
        student_CV = (logits_CV / temperature).log_softmax(-1)
        return temperature**2 * F.kl_div(student_CV, teacher_CV, log_target=True, reduction="sum")

    return loss_fn


@pytest.mark.parametrize("loss_fn", [focal, smoothed, with_z_loss, distilled(make_head("bias"))])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_loss_by_autograd_equals_the_full_logits(loss_fn, chunk):
    head, (hidden, targets) = make_head("lora on nf4"), inputs()
    index = (targets.flatten() >= 0).nonzero().squeeze(1)
    hidden_ND = hidden.flatten(0, 1).index_select(0, index).detach().requires_grad_()
    per_position = torch.randn(len(index), D) if loss_fn.__name__ == "loss_fn" else targets.flatten()[index]
    expected = loss_fn(head(hidden_ND), per_position)
    loss = linear_loss(hidden_ND, head, by_autograd(loss_fn), per_position, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients(3 * loss, hidden_ND, head), gradients(3 * expected, hidden_ND, head), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        evaluated = linear_loss(hidden_ND, head, by_autograd(loss_fn), per_position, chunk=chunk)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, expected.detach())
