"""The methods beside LoRA under everything that a run may combine them with."""

import pytest
import torch

from checkpointing.training_state import load_training_state, save_training_state
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from modules.attention import packed_layout
from modules.fused.blocks import why_not
from modules.generation import generate
from modules.memory.activations import keep_activations
from modules.memory.weight_streaming import stream_weights
from modules.optim import build_optimizer
from modules.quantization.nf4 import quantize_nf4
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import adamw, behind_virtual, hidden_of, ids, logits, train, trained

VIRTUAL = ("prompt", "p-tuning", "p-tuning lstm", "prefix", "prefix mlp")
METHODS = ("ia3", "bitfit", "ln", "houlsby", "pfeiffer", "parallel", *VIRTUAL)
ENCODED = ("p-tuning lstm", "prefix mlp")  # the others: test_every_method.py
CPU = torch.device("cpu")


def build(folder, method, **options):
    return add(load(folder), method, **options)


def add(model, method, **options):
    method, _, encoder = method.partition(" ")
    torch.manual_seed(0)
    virtual = dict(num_virtual_tokens=3, prompt_encoder=encoder or None, encoder_size=24)
    add_method(model, method, Options(rank=4, **virtual, **options))
    return model


def randomise(model):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)


@pytest.fixture
def base(tmp_path):
    make_pair(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("method", METHODS)
def test_over_nf4(base, method):
    """Training over NF4 is training over the dequantised weights, and leaves the 4-bit ones alone."""
    quantized, dense = load(base), load(base)
    names = quantize_nf4(quantized)
    for name in names:
        dense.get_submodule(name).weight.data = quantized.get_submodule(name).dense_weight()
    start = logits(quantized)
    bits = {name: quantized.get_submodule(name).weight.quantized_data.clone() for name in names}
    for model in (quantized, dense):
        add(model, method)
    assert torch.equal(logits(quantized), start) == (method not in VIRTUAL)
    got, expected = (train(model, adamw(model, 1e-2), steps=5) for model in (quantized, dense))
    assert got == pytest.approx(expected, abs=1e-5) and got[-1] != got[0]
    assert all(torch.equal(bits[name], quantized.get_submodule(name).weight.quantized_data) for name in names)


@pytest.mark.parametrize("rung", ["fast", "lean", "offload"])
@pytest.mark.parametrize("method", ENCODED)
def test_with_activation_memory_measures(base, method, rung):
    plain, lean = build(base, method), build(base, method)
    keep_activations(lean, rung)
    expected, got = (train(model, adamw(model, 1e-2), steps=4) for model in (plain, lean))
    assert got == pytest.approx(expected, abs=1e-6)
    for name, p in trained(plain).items():
        torch.testing.assert_close(lean.get_parameter(name), p, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_hand_written_block_refuses(base, method):
    assert why_not(build(base, method))


@pytest.mark.parametrize("method", METHODS)
def test_generation_with_and_without_cache(base, method):
    model = build(base, method)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    before = generate(model, prompts, max_new_tokens=12)
    randomise(model)
    cached = generate(model, prompts, max_new_tokens=12)
    assert cached == generate(model, prompts, max_new_tokens=12, use_cache=False) and cached != before


@pytest.mark.parametrize("method", ENCODED)
def test_packed_equals_unpacked(base, method):
    model = build(base, method)
    randomise(model)
    tokens = ids()[0]
    rows = [behind_virtual(model, part[None])[0] for part in tokens.split([8, 12])]
    lengths = [len(row) for row in rows]
    layout = packed_layout([lengths], sum(lengths) + 5).prepare(CPU, torch.float32)
    padded = torch.cat([*rows, torch.zeros(5, dtype=torch.long)])
    packed = model(padded[None], layout)[0, : sum(lengths)]
    alone = [model(row[None])[0] for row in rows]
    assert (packed - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ENCODED)
def test_resumes_bit_for_bit(base, tmp_path, method):
    def start():
        model = build(base, method)
        return model, build_optimizer("adamw", trained(model), lr=1e-2, weight_decay=0.1)

    model, optimizer = start()
    train(model, optimizer, steps=4)
    save_training_state(tmp_path / "state", parameters=trained(model), optimizer=optimizer, progress={"step": 4})
    expected = train(model, optimizer, steps=4)
    resumed, optimizer = start()
    load_training_state(tmp_path / "state", parameters=trained(resumed), optimizer=optimizer)
    assert train(resumed, optimizer, steps=4) == expected
    assert all(torch.equal(p, trained(model)[name]) for name, p in trained(resumed).items())


@pytest.mark.parametrize("method", METHODS)
def test_over_streamed_weights(base, method):
    plain, streamed = build(base, method), load(base)
    weights = stream_weights(streamed.requires_grad_(False), CPU)
    add(streamed, method)
    keep_activations(streamed, "lean", bind=weights.use)
    expected, got = (train(model, adamw(model, 1e-2), steps=4) for model in (plain, streamed))
    assert got == pytest.approx(expected, abs=1e-6) and got[-1] != got[0]


@pytest.mark.parametrize("method", METHODS)
def test_over_bfloat16(base, method):
    """What is trained stays float32 and is cast where used: the model computes in bfloat16 throughout."""
    model = load(base).to(torch.bfloat16)
    start = model(ids())
    add(model, method)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    hidden = hidden_of(model, ids())
    assert hidden.dtype == torch.bfloat16 and torch.equal(hidden, start) == (method not in VIRTUAL)
    hidden.float().square().sum().backward()
    assert any(p.grad.any() for p in trained(model).values())
