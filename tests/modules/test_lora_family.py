"""What every relative of LoRA has to keep: the frozen weights, NF4, recomputation, compile, resume, merging."""

import pytest
import torch

from checkpointing.training_state import load_training_state, save_training_state
from data.batches import Batch
from modules.activations import keep_activations
from modules.attention import padded_layout
from modules.lora import merge_lora
from modules.lora_block import disagreement, why_not
from modules.methods import Options, add_method, find_method
from modules.nf4 import NF4Linear, quantize_nf4
from modules.optim import build_optimizer
from tests.models.test_llama import make_pair
from tests.modules.peft_methods import ids, logits, loss_of, train, trained

FAMILY = ("lora", "rslora", "dora", "lora-plus", "lora-fa", "pissa", "olora", "vera", "loftq", "eva")


def make(folder, name, *, nf4=False, drawn=0, **options):
    """A tiny model with the method, over NF4 if wanted, as a recipe puts it together."""
    _, model = make_pair(folder, num_attention_heads=4)
    dense_first = getattr(find_method(name), "NEEDS_DENSE", False)
    if nf4 and not dense_first:
        quantize_nf4(model)
    kind = NF4Linear if nf4 or name == "loftq" else None
    torch.manual_seed(1)
    torch.rand(drawn)
    add_method(model, name, Options(rank=4, alpha=8.0, quantize=kind, batches=batches(), **options))
    if nf4 and dense_first:
        quantize_nf4(model)
    return model


def batches():
    layout = padded_layout(20).prepare(torch.device("cpu"), torch.float32)
    return [Batch(ids(seed), layout, torch.arange(38), ids(seed).flatten()[:38]) for seed in (1, 2)]


def optimizer_of(model, lr=1e-2):
    method = find_method(model.method)
    groups = method.parameter_groups(trained(model), lr) if hasattr(method, "parameter_groups") else None
    optimizer = build_optimizer("adamw", trained(model), lr=lr, weight_decay=0.0, groups=groups)
    if hasattr(method, "prepare_optimizer"):
        method.prepare_optimizer(model, optimizer)
    return optimizer


def inner(p):
    """Plain tensors to compare: of an NF4 weight its codes."""
    return p.quantized_data if hasattr(p, "quantized_data") else p.detach()


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_trains_its_own_and_nothing_else(tmp_path, name, nf4):
    model = make(tmp_path, name, nf4=nf4)
    assert any(
        isinstance(m, NF4Linear) or hasattr(m.weight, "quantized_data")
        for m in model.blocks[0].modules()
        if isinstance(m, torch.nn.Linear)
    ) == (nf4 or name == "loftq")
    before = {key: inner(p).clone() for key, p in model.named_parameters()}
    mine = set(trained(model))
    assert mine and all(".lora_" in key or ".vera_" in key for key in mine)
    losses = train(model, optimizer_of(model), steps=8)
    assert min(losses[4:]) < losses[0]
    for key, p in model.named_parameters():
        assert torch.equal(inner(p), before[key]) == (key not in mine), key
    adapted = logits(model)
    merge_lora(model)
    assert not any(hasattr(m, "merged") for m in model.modules())
    assert (logits(model) - adapted).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILY)
def test_recomputation_changes_nothing(tmp_path, name):
    gradients = []
    for rung in ("none", "fast", "lean", "offload"):
        model = make(tmp_path / rung, name)
        train(model, optimizer_of(model), steps=2)
        keep_activations(model, rung)
        loss_of(model, ids()).backward()
        gradients.append({key: p.grad for key, p in trained(model).items()})
    for other in gradients[1:]:
        for key, gradient in gradients[0].items():
            assert gradient.abs().max() > 0, key
            torch.testing.assert_close(other[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILY)
def test_compiles_in_one_graph(tmp_path, name):
    model = make(tmp_path, name)
    train(model, optimizer_of(model), steps=2)
    plain = loss_of(model, ids())
    plain.backward()
    gradients = {key: p.grad.clone() for key, p in trained(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = loss_of(model, ids())
    compiled.backward()
    assert abs(compiled - plain) < 1e-5
    for key, p in trained(model).items():
        torch.testing.assert_close(p.grad, gradients[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_resumes_bit_for_bit(tmp_path, name):
    model = make(tmp_path / "base", name, dropout=0.1)
    optimizer = optimizer_of(model)
    torch.manual_seed(5)
    train(model, optimizer, steps=3)
    save_training_state(tmp_path / "state", parameters=trained(model), optimizer=optimizer, progress={"step": 3})
    expected = train(model, optimizer, steps=3)
    again = make(tmp_path / "base", name, drawn=7, dropout=0.1)  # only the seed need be the same
    optimizer = optimizer_of(again)
    load_training_state(tmp_path / "state", parameters=trained(again), optimizer=optimizer)
    assert train(again, optimizer, steps=3) == expected
    for key, p in trained(model).items():
        assert torch.equal(p, again.get_parameter(key)), key


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "loftq"])
def test_starts_at_the_base(tmp_path, name):
    _, base = make_pair(tmp_path / "again")
    model = make(tmp_path, name)
    exact = name not in ("pissa", "olora")  # W - s · B A + s · B A rounds
    deviation = (logits(model) - logits(base)).abs().max()
    assert deviation == 0 if exact else 0 < deviation < 1e-5


@pytest.mark.parametrize("name", FAMILY)
def test_by_hand_where_the_layer_computes_what_lora_does(tmp_path, name):
    """DoRA's and VeRA's blocks are left to the plain modules, by name."""
    model = make(tmp_path, name)
    train(model, optimizer_of(model), steps=2)
    if name in ("dora", "vera"):
        assert why_not(model) == f"self_attn.q_proj is a {'DoRALinear' if name == 'dora' else 'VeRALinear'}"
    else:
        assert why_not(model) is None and disagreement(model) is None


def test_every_option_reaches_the_layers(tmp_path):
    for name in FAMILY:
        model = make(tmp_path / name, name, dropout=0.5, targets=("q_proj", "down_proj"), dtype=torch.bfloat16)
        assert {key.split(".")[-3 if "lora_A" in key or "lora_B" in key else -2] for key in trained(model)} <= {
            "q_proj",
            "down_proj",
        }
        assert all(p.dtype == torch.bfloat16 for p in trained(model).values())
        train(model, torch.optim.SGD(trained(model).values(), lr=0.5), steps=2)
        model.train()
        assert not torch.equal(loss_of(model, ids()), loss_of(model, ids()))  # dropout
        model.eval()
        assert torch.equal(loss_of(model, ids()), loss_of(model, ids()))
