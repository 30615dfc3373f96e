"""Every mode of activation memory, plain and fused, against the model as it stands; gradcheck in float64."""

import gc

import pytest
import torch

from data.batches import SequenceLayout
from models import build_model
from modules import compile
from modules.adapters.lora import ALL_LINEAR, add_lora, lora_layers
from modules.attention import packed_layout, padded_layout
from modules.fused import blocks as fused_blocks
from modules.fused import lora_block
from modules.loss import linear_cross_entropy
from modules.memory.activations import MODES, checkpoint_activations
from modules.quantization.nf4 import NF4Linear, quantize_nf4, quantize_nf4_tensor

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def make_model(targets=ALL_LINEAR, nf4=False, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = build_model(CONFIG | changes).to_empty(device="cpu").to(dtype)
    model.init_weights()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    if nf4:
        quantize_nf4(model)
    add_lora(model, rank=3, alpha=7.0, targets=targets, dtype=dtype)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, 0.0, 0.2)
    return model.train()


def loss_and_gradients(model, layout: SequenceLayout, ids):
    model.zero_grad()
    hidden = model(ids, layout)
    loss = linear_cross_entropy(hidden[:, :-1], model.lm_head, ids[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def ids_and_layout(packed: bool):
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    layout = packed_layout([[5, 9, 7], [12, 4]], 21) if packed else padded_layout(21)
    return ids, layout.prepare(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", (*MODES, "attention"))
def test_modes_train_the_same(mode, fused, packed, monkeypatch):
    ids, layout = ids_and_layout(packed)
    model = make_model()
    expected = loss_and_gradients(model, layout, ids)
    if fused:  # several tiles of tokens, the last one smaller, and both groups of heads
        monkeypatch.setattr(lora_block, "TILE_BYTES", 16 * 3 * 48 * 4)
        monkeypatch.setattr(lora_block, "WORKSPACE_BYTES", 1)
    if mode == "attention" and not fused:
        with pytest.raises(ValueError, match="needs --activations offload and fused blocks"):
            checkpoint_activations(model, "offload", host_budget=1)
        return
    keep(model, mode, fused)
    for _ in range(2):
        check(loss_and_gradients(model, layout, ids), expected)


def check(got, expected):
    assert abs(got[0] - expected[0]) < 1e-5 * expected[0]
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def keep(model, mode, fused):
    """A mode by name; "attention": offload with host memory for every block."""
    if mode == "attention":
        return checkpoint_activations(model, "offload", host_budget=2**40, fused=fused)
    return checkpoint_activations(model, mode, fused=fused)


@pytest.mark.parametrize("mode", ["fast", "lean", "offload", "attention"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "down_proj"), ("o_proj", "up_proj")])
def test_fused_block_with_some_targets_and_nf4(targets, mode):
    ids, layout = ids_and_layout(False)
    for nf4 in (False, True):
        model = make_model(targets, nf4)
        expected = loss_and_gradients(model, layout, ids)
        keep(model, mode, fused=True)
        check(loss_and_gradients(model, layout, ids), expected)


@pytest.mark.parametrize("keep", ["fast", "lean"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_fused_block(keep, packed, monkeypatch):
    monkeypatch.setattr(lora_block, "TILE_BYTES", 3 * 3 * 8 * 8)
    monkeypatch.setattr(lora_block, "WORKSPACE_BYTES", 1)
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = make_model(dtype=torch.float64, **small)
    block = model.blocks[0]
    layout = packed_layout([[3, 2], [4]], 5) if packed else padded_layout(5)
    layout = layout.prepare(torch.device("cpu"), torch.float64)
    cos, sin = model.model.rotary(layout.positions, layout.longest, torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    adapters = [p for p in block.parameters() if p.requires_grad]

    fused = fused_blocks.FusedBlocks(model)

    def run(x, *_):
        return fused.run(block, x, cos, sin, layout, keep=keep, bind=lambda block: None)

    assert len(adapters) == 14
    assert torch.autograd.gradcheck(run, (x, *adapters))
    expected = torch.autograd.grad(block(x, cos, sin, layout).square().sum(), [x, *adapters])
    out = run(x)
    for _ in range(2):  # what was kept serves the first backward, the second one computes it again
        got = torch.autograd.grad(out.square().sum(), [x, *adapters], retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [*MODES, "attention"])
def test_nothing_is_left_of_a_step(mode):
    ids, layout = ids_and_layout(False)
    model = make_model()
    keep(model, mode, fused=True)
    left = []
    for _ in range(3):
        loss_and_gradients(model, layout, ids)
        model(ids, layout)  # a graph that is never used
        gc.collect()
        left.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert left[1] == left[2]


def test_offloaded_input_serves_one_backward():
    ids, layout = ids_and_layout(False)
    model = make_model()
    checkpoint_activations(model, "offload", fused=True)
    out = model(ids, layout).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only"):
        out.backward()


def test_lean_keeps_fewer_bytes():
    """Bytes that autograd keeps, per mode; `offload` keeps none on a GPU, on the CPU there is nowhere else to go."""
    ids, layout = ids_and_layout(False)
    kept = {}
    for mode in ("none", "lean"):
        model = make_model()
        checkpoint_activations(model, mode)
        sizes = {}

        def pack(tensor, sizes=sizes):
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, layout)
        kept[mode] = sum(sizes.values())
    assert kept["lean"] < 0.5 * kept["none"], kept


@pytest.mark.parametrize("mode", ["fast", "lean", "offload"])
def test_blocks_before_all_that_is_trained_run_once(mode, monkeypatch):
    ids, layout = ids_and_layout(False)
    calls = []
    for targets, expected in ((("lm_head",), 3), (("layers.2.mlp.up_proj",), 4)):
        model = make_model(targets)
        checkpoint_activations(model, mode)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        loss_and_gradients(model, layout, ids)
        assert len(calls) == expected
        calls.clear()


def test_every_and_budget_choose_blocks(monkeypatch):
    ids, layout = ids_and_layout(False)
    model = make_model()
    kept = []
    original = fused_blocks.FusedBlocks.run

    def spy(*args, keep, bind):
        kept.append(keep)
        return original(*args, keep=keep, bind=bind)

    monkeypatch.setattr(fused_blocks.FusedBlocks, "run", spy)
    checkpoint_activations(model, "lean", every=2, fused=True)
    loss_and_gradients(model, layout, ids)
    assert kept == ["lean", "fast", "lean"]
    kept.clear()
    one_block = 42 * (2 * 32 + 12 * 8 + 2 * 48) * 4
    checkpoint_activations(model, "lean", budget=2 * one_block, fused=True)
    loss_and_gradients(model, layout, ids)
    assert kept == ["lean", "fast", "fast"]
    kept.clear()
    up_to_attention = 42 * (2 * 32 + 12 * 8) * 4
    checkpoint_activations(model, "offload", budget=one_block, host_budget=up_to_attention, fused=True)
    loss_and_gradients(model, layout, ids)
    assert kept == ["attention", "offload", "fast"]


def test_what_the_fused_block_does_not_cover():
    assert fused_blocks.why_plain(make_model()) is None
    assert "dropout" in fused_blocks.why_plain(with_dropout())
    assert "SiLU" in fused_blocks.why_plain(make_model(hidden_act="gelu"))
    assert "trained" in fused_blocks.why_plain(make_model().requires_grad_(True))
    assert "adapter" in fused_blocks.why_plain(make_model(("layers.1.self_attn.q_proj",)))


def with_dropout():
    model = make_model()
    lora_layers(model)["model.layers.0.mlp.up_proj"].dropout.p = 0.1
    return model


def test_bad_settings():
    with pytest.raises(ValueError, match="--activations-every 0"):
        checkpoint_activations(make_model(), "lean", every=0)
    with pytest.raises(ValueError, match="must not be negative"):
        checkpoint_activations(make_model(), "offload", host_budget=-1, fused=True)
    with pytest.raises(ValueError, match="--activations 'all'"):
        checkpoint_activations(make_model(), "all")


def test_streamed_weights_must_be_computed_again():
    for mode in ("none", "fast"):
        with pytest.raises(ValueError, match="left the card"):
            checkpoint_activations(make_model(), mode, bind=print)


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True])
def test_modes_on_a_gpu(nf4, monkeypatch):
    """bfloat16: every mode is as near to float32 as the plain model is; other lengths compile nothing anew."""
    device, built = torch.device("cuda"), []
    build = compile._build
    monkeypatch.setattr(compile, "_build", lambda *args: built.append(args[0].__name__) or build(*args))
    ids = torch.randint(0, 97, (2, 1024), generator=torch.Generator().manual_seed(1)).to(device)
    layout = padded_layout(1024).prepare(device, torch.bfloat16)

    def make(dtype):
        model = make_model(nf4=False, hidden_size=256, intermediate_size=512, num_hidden_layers=6).to(device)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.data *= 0.25  # outputs of about the size of inputs
            if ".lora_" not in name:  # the same numbers in both precisions
                parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
        for layer in lora_layers(model).values() if nf4 else ():
            layer.base_class = NF4Linear
            layer.weight = torch.nn.Parameter(quantize_nf4_tensor(layer.weight.detach()), requires_grad=False)
        return model

    expected_loss, expected = loss_and_gradients(make(torch.float32), layout, ids)

    def error(gradients):
        differences = [(gradients[name] - gradient).norm() / gradient.norm() for name, gradient in expected.items()]
        return torch.stack(differences).mean().item()

    model = make(torch.bfloat16)
    plain = error(loss_and_gradients(model, layout, ids)[1])
    peaks = {}
    for mode in ("fast", "lean", "offload", "attention"):
        for fused in (False, True) if mode != "attention" else (True,):
            keep(model, mode, fused)
            for length in (1024, 512, 640, 1024):
                if length == 640:
                    built.clear()
                torch.cuda.reset_peak_memory_stats()
                shorter = padded_layout(length).prepare(device, torch.bfloat16)
                loss, gradients = loss_and_gradients(model, shorter, ids[:, :length])
            assert not built, (mode, fused, built)
            peaks[mode, fused] = torch.cuda.max_memory_allocated()
            assert abs(loss - expected_loss) < 2e-3 * expected_loss, (mode, fused)
            assert error(gradients) < 1.2 * plain, (mode, fused)
    assert peaks["offload", True] < peaks["lean", True] < peaks["fast", True], peaks
