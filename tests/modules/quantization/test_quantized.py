"""int8, int4 and float8 weights: against torchao, their error and size, and the frozen layer over them."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from modules.adapters.lora import LoRALinear
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from modules.memory.plan import plan_memory, storage_bytes
from modules.quantization.nf4 import NF4Tensor
from modules.quantization.quantize import KINDS, linear_kind, quantize_blocks, stored_as
from modules.quantization.quantized import Float8Tensor, Int4Tensor, Int8Tensor, quantize_tensor
from tests.models.test_llama import make_pair
from tests.modules.adapters.every_method import batches
from tests.modules.adapters.peft_methods import logits, train, trained

TENSORS = {"int8": Int8Tensor, "int4": Int4Tensor, "float8": Float8Tensor}
BITS = {"int8": 8 + 32 / 4096, "int4": 4.5, "float8": 8 + 32 / 4096}
ERRORS = {"int8": 0.0087, "int4": 0.0860, "float8": 0.0265}  # torchao's int4 in groups of 32, symmetric: 0.0948


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torchao(weight, config):
    layer = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    layer[0].weight = nn.Parameter(weight.clone())
    quantize_(layer, config)
    return layer[0].weight


@pytest.mark.parametrize(
    ("kind", "config"), [("int8", Int8WeightOnlyConfig(version=2)), ("float8", Float8WeightOnlyConfig())]
)
def test_equals_torchao_code_for_code(kind, config):
    weight = normal(96, 256) * 0.05
    theirs, ours = torchao(weight, config), quantize_tensor(weight, TENSORS[kind])
    assert torch.equal(theirs.qdata.view(torch.int8), ours.codes)
    assert torch.equal(theirs.scale[:, 0], ours.scales)
    assert torch.equal(theirs.dequantize(), ours.dense())


def test_int4_dequantises_as_torchao_and_rounds_better():
    """torchao's groups have positive scales; with our codes and scales put in, its tensor reads as ours."""
    weight = normal(96, 256)
    theirs, ours = torchao(weight, IntxWeightOnlyConfig(torch.int4, PerGroup(32))), quantize_tensor(weight, Int4Tensor)
    error = [(w.dequantize() if w is theirs else w.dense()).sub(weight).norm() for w in (theirs, ours)]
    assert error[1] < 0.95 * error[0]
    theirs.qdata.copy_((torch.stack((ours.codes & 15, ours.codes >> 4), -1).to(torch.int8) - 8).view(96, 256))
    theirs.scale.copy_(ours.scales)
    theirs.zero_point.zero_()
    assert torch.equal(theirs.dequantize(), ours.dense())


@pytest.mark.parametrize("kind", TENSORS)
def test_error_and_size_on_normal_weights(kind):
    weight = normal(512, 4096)
    quantised = quantize_tensor(weight, TENSORS[kind])
    error = ((quantised.dense() - weight).norm() / weight.norm()).item()
    assert error == pytest.approx(ERRORS[kind], abs=0.0005)
    assert storage_bytes(quantised) * 8 / weight.numel() == BITS[kind]


def test_every_float8_is_decoded_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)[None]
    got, expected = Float8Tensor.decode(codes, torch.ones(1), torch.float32), codes.view(torch.float8_e4m3fn).float()
    finite = ~expected.isnan()
    assert finite.sum() == 254 and torch.equal(got[finite], expected[finite])


@pytest.mark.parametrize("kind", TENSORS)
def test_zeros_small_rows_and_nan(kind):
    weight = normal(8, 64)
    weight[3] = 0
    weight[4] *= 1e-20
    dense = quantize_tensor(weight, TENSORS[kind]).dense()
    assert not dense[3].any() and (dense[4] - weight[4]).abs().max() < 0.2 * weight[4].abs().max()
    if kind != "int8":  # what is rounded once stays; int8's largest is 127 of 127.5
        assert torch.equal(dense, quantize_tensor(dense, TENSORS[kind]).dense())
    weight[5, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_tensor(weight, TENSORS[kind])


def test_rows_of_other_lengths():
    for width in (48, 20, 6):
        weight = normal(8, width)
        assert (quantize_tensor(weight, Int4Tensor).dense() - weight).abs().max() < 0.5
    with pytest.raises(ValueError, match="odd"):
        quantize_tensor(normal(8, 5), Int4Tensor)


@pytest.mark.parametrize("kind", TENSORS)
def test_chunks_change_nothing(monkeypatch, kind):
    weight = normal(32, 64)
    whole = quantize_tensor(weight, TENSORS[kind])
    monkeypatch.setattr("modules.quantization.quantized.CHUNK", 200)
    assert torch.equal(quantize_tensor(weight, TENSORS[kind]).dense(), whole.dense())


@pytest.mark.parametrize("kind", [*TENSORS, "nf4"])
def test_linear_equals_the_dense_layer_and_keeps_no_dense_weight(kind):
    torch.manual_seed(0)
    dense = nn.Linear(128, 96)
    layer = linear_kind(kind).from_linear(dense)
    assert isinstance(layer.weight, TENSORS.get(kind, NF4Tensor)) and not any(
        p.requires_grad for p in layer.parameters()
    )
    x = torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert 128 * 96 not in saved
    want = x @ layer.dense_weight().t() + dense.bias
    torch.testing.assert_close(y, want)
    upstream = torch.randn_like(y)
    (got,), (expected,) = (torch.autograd.grad(out, x, upstream) for out in (y, want))
    torch.testing.assert_close(got, expected)
    assert torch.equal(stored_as(linear_kind(kind), dense.weight.detach()).dense_weight(), layer.dense_weight())


@pytest.mark.parametrize("kind", TENSORS)
def test_reads_as_a_dense_parameter(kind):
    layer = linear_kind(kind).from_linear(nn.Linear(64, 32, dtype=torch.bfloat16))
    assert layer.weight.shape == (32, 64) and layer.weight.numel() == 2048 and layer.weight.dtype == torch.bfloat16
    assert layer.dense_weight().dtype == torch.bfloat16
    copied = copy.deepcopy(layer)
    assert copied.weight.codes is not layer.weight.codes and torch.equal(copied.dense_weight(), layer.dense_weight())
    before = layer.weight.codes
    layer.to(torch.float32)
    assert layer.weight.dtype == torch.float32 and torch.equal(
        layer.weight.codes.view(torch.uint8), before.view(torch.uint8)
    )
    merged = LoRALinear(copied, 4, 8.0, 0.0, torch.float32).merged()
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="compute with its dense"):
        layer.weight + 1


@pytest.mark.parametrize("kind", TENSORS)
def test_the_memory_plan_counts_codes_and_scales(tmp_path, kind):
    _, model = make_pair(tmp_path, hidden_size=64, intermediate_size=128)
    plan = dict(tokens=8, dtype=torch.float32)
    dense = plan_memory(model, "lean", **plan)["weights"]
    names = quantize_blocks(model, linear_kind(kind))
    count = sum(model.get_submodule(name).weight.numel() for name in names)
    rows = sum(model.get_submodule(name).out_features for name in names)
    stored = count * 4.5 / 8 if kind == "int4" else count + 4 * rows
    assert plan_memory(model, "lean", **plan)["weights"] == dense - 4 * count + stored


@pytest.mark.slow(1)
@pytest.mark.parametrize("kind", TENSORS)
def test_compiles_in_one_graph(tmp_path, kind):
    _, model = make_pair(tmp_path, num_hidden_layers=1)
    quantize_blocks(model, linear_kind(kind))
    add_method(model, "lora", Options(rank=4))
    eager = logits(model)
    torch._dynamo.reset()
    model.blocks[0].mlp.compile(backend="aot_eager", fullgraph=True)
    train(model, torch.optim.AdamW(trained(model).values(), lr=0.0), steps=1)
    assert (logits(model) - eager).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["pissa", "olora", "loftq", "dora", "eva"])
def test_methods_that_begin_from_the_weights(tmp_path, method, kind):
    """PiSSA, OLoRA and LoftQ quantise what they leave; their start is nearer to the base than the quantised base is."""
    _, model = make_pair(tmp_path)
    base = logits(model)
    _, plain = make_pair(tmp_path)
    quantize_blocks(plain, linear_kind(kind))
    if method in ("dora", "eva"):
        quantize_blocks(model, linear_kind(kind))
    add_method(model, method, Options(rank=24, alpha=24.0, quantize=linear_kind(kind), batches=batches()))
    quantize_blocks(model, linear_kind(kind))
    assert {type(p).__name__ for n, p in model.named_parameters() if n.endswith("_proj.weight")} == {
        type(p).__name__ for n, p in plain.named_parameters() if n.endswith("_proj.weight")
    }
    if method in ("pissa", "loftq"):
        assert (logits(model) - base).norm() < (logits(plain) - base).norm()
    losses = train(model, torch.optim.AdamW(trained(model).values(), lr=3e-3), steps=8)
    assert min(losses[4:]) < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TENSORS)
def test_one_kernel_gives_the_same_on_a_gpu(kind):
    quantised = quantize_tensor(normal(256, 512).bfloat16(), TENSORS[kind])
    there = nn.Parameter(quantised, requires_grad=False).cuda()
    assert there.dense().is_cuda and torch.equal(there.dense().cpu(), quantised.dense())


def test_an_unknown_kind_is_explained(tmp_path):
    assert linear_kind("none") is None
    with pytest.raises(ValueError, match="--quantize 'int3' is not one of none, nf4, int8, int4, float8"):
        linear_kind("int3")
    _, model = make_pair(tmp_path)
    assert quantize_blocks(model, None) == []
    with pytest.raises(ValueError, match="--quantize-head .* needs --quantize nf4"):
        quantize_blocks(model, None, head=True)
