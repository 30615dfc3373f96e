"""No edit of a model or a part is ignored: the fused block follows it, or the run falls back to the modules."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from models import llama
from modules import attention, norm
from modules.adapters.lora import LoRALinear
from modules.attention import Attention, SequenceLayout, apply_rotary, attend
from modules.feed_forward import FeedForward
from modules.fused import known
from modules.fused.blocks import choose_blocks, why_plain
from modules.memory.activations import checkpoint_activations
from modules.norm import RMSNorm
from modules.quantization.nf4 import NF4Linear
from modules.quantization.quantized import Float8Linear, Int4Linear, Int8Linear
from tests.modules.memory.test_activations import ids_and_layout, loss_and_gradients, make_model

# Edits as a fork would make them: of a class in place, of an attribute, of one block or of the model around the blocks.
EDITS = {}


def edit(function):
    EDITS[function.__name__] = function
    return function


def before(cls, name, change, patch):
    """Patch a method so that `change(self, arguments)` sees its arguments first."""
    original = getattr(cls, name)
    patch.setattr(cls, name, lambda self, *args: original(self, *change(self, args)))


def after(cls, name, change, patch):
    original = getattr(cls, name)
    patch.setattr(cls, name, lambda self, *args: change(self, original(self, *args)))


@edit
def window_as_an_attribute_of_attention(model, patch):
    for block in model.blocks:
        block.self_attn.window = 4
    before(Attention, "forward", lambda self, a: (*a[:3], a[3].with_window(self.window), *a[4:]), patch)


@edit
def window_in_every_other_layer(model, patch):
    patch.setattr(
        llama.LlamaModel,
        "run_embedded",
        lambda self, x, layout, caches=None: self.norm(
            [
                x := self.run_block(b, x, *self.rotary(layout.positions, 21, x.dtype), layout.with_window(w), None)
                for b, w in zip(self.layers, (4, None, 6), strict=True)
            ][-1]
        ),
    )


@edit
def who_sees_whom(model, patch):
    patch.setattr(SequenceLayout, "sees", lambda self, q, k: (k <= q) & (q - k < 5))


@edit
def scale_by_depth(model, patch):
    def forward(self, x, cos, sin, layout, cache=None):
        x = x + (self.index + 1) ** -0.5 * self.self_attn(self.input_layernorm(x), cos, sin, layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    patch.setattr(llama.LlamaBlock, "forward", forward)


@edit
def no_rotary_in_the_last_block(model, patch):
    layer = model.blocks[-1].self_attn
    layer.rotary = False
    before(
        Attention,
        "forward",
        lambda self, a: a if getattr(self, "rotary", True) else (a[0], torch.ones_like(a[1]), a[2] * 0, *a[3:]),
        patch,
    )


@edit
def no_rotary_in_the_model(model, patch):
    run = model.model.rotary
    model.model.rotary = lambda *args: tuple(t * 0 + (i == 0) for i, t in enumerate(run(*args)))


@edit
def a_norm_class_of_ones_own(model, patch):
    model.blocks[2].input_layernorm = torch.nn.LayerNorm(32)
    model.blocks[2].input_layernorm.requires_grad_(False)


@edit
def query_and_key_norms(model, patch):
    for block in model.blocks:
        block.self_attn.q_norm = RMSNorm(8).requires_grad_(False)
    after(Attention, "keys_and_values", lambda self, kv: (self.q_norm(kv[0]), kv[1]), patch)


@edit
def biases(model, patch):
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")):
            layer.bias = torch.nn.Parameter(torch.linspace(-1, 1, layer.out_features), requires_grad=False)


@edit
def a_parallel_block(model, patch):
    def forward(self, x, cos, sin, layout, cache=None):
        return x + self.self_attn(self.input_layernorm(x), cos, sin, layout, cache) + self.mlp(x)

    patch.setattr(llama.LlamaBlock, "forward", forward)


@edit
def one_block_patched(model, patch):
    original = model.blocks[1].forward
    model.blocks[1].forward = lambda *args: original(*args) * 0.9


@edit
def a_block_class_of_ones_own(model, patch):
    class Block(llama.LlamaBlock):
        def forward(self, x, *args):
            return super().forward(x, *args) * 0.9

    model.blocks[0].__class__ = Block


EDITS |= {
    "window_in_the_model": lambda model, patch: before(
        llama.LlamaModel, "run_embedded", lambda self, a: (a[0], a[1].with_window(4), *a[2:]), patch
    ),
    "embeddings_scaled": lambda model, patch: before(
        llama.LlamaModel, "run_embedded", lambda self, a: (a[0] * 3, *a[1:]), patch
    ),
    "residual_scale_from_block_one_on": lambda model, patch: after(
        llama.LlamaBlock, "forward", lambda self, y: y * (0.5 if self.index else 1.0), patch
    ),
    "scores_are_capped_in_attend": lambda model, patch: patch.setattr(
        attention, "attend", lambda q, k, v, layout: attend(q * 0.5, k, v, layout)
    ),
    "other_rotation": lambda model, patch: patch.setattr(
        attention, "apply_rotary", lambda x, cos, sin: apply_rotary(x, cos, -sin)
    ),
    "a_norm_with_one_plus_weight": lambda model, patch: after(
        RMSNorm, "forward", lambda self, y: y * (1 + self.weight) / self.weight, patch
    ),
    "another_eps_in_one_norm": lambda model, patch: setattr(model.blocks[1].input_layernorm, "eps", 0.3),
    "another_activation_in_one_layer": lambda model, patch: setattr(model.blocks[1].mlp, "activation", F.gelu),
    "a_feed_forward_of_another_formula": lambda model, patch: patch.setattr(
        FeedForward, "forward", lambda self, x: self.down_proj(self.up_proj(x).relu() + self.gate_proj(x))
    ),
    "a_hook": lambda model, patch: model.blocks[2].mlp.register_forward_hook(lambda module, args, y: y * 0.5),
    "another_lora": lambda model, patch: after(LoRALinear, "forward", lambda self, y: y * 1.1, patch),
    "another_scaling": lambda model, patch: patch.setattr(
        LoRALinear, "scaling", property(lambda self: self.alpha / self.rank**0.5)
    ),
}


def trained(model, ids, layout, fused):
    checkpoint_activations(model, "lean", fused=fused)
    return loss_and_gradients(model, layout, ids)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_no_edit_is_ignored(name, packed, monkeypatch):
    ids, layout = ids_and_layout(packed)
    untouched, _ = trained(make_model(), ids, layout, fused=False)
    model = make_model()
    EDITS[name](model, monkeypatch)
    layout = layout.prepare(layout.positions.device, torch.float32)  # who sees whom may be another
    expected, gradients = trained(model, ids, layout, fused=False)
    assert abs(expected - untouched) > 1e-3  # or the edit is none
    reason = choose_blocks(model, SimpleNamespace(input_ids=ids, layout=layout))
    loss, fused_gradients = trained(model, ids, layout, fused=not reason)
    assert abs(loss - expected) < 1e-5 * abs(expected), reason
    for key, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[key], gradient, rtol=1e-3, atol=1e-4)
    follows = ("window_in", "who", "scores", "no_rotary_in_the_model", "another_eps", "biases", "another_scal", "emb")
    assert (reason is None) == name.startswith(follows), reason


def test_what_it_computes_is_on_record():
    kinds = (llama.LlamaBlock, Attention, FeedForward, RMSNorm, LoRALinear, NF4Linear)
    kinds += (Int8Linear, Int4Linear, Float8Linear)
    now = {name: digest for kind in kinds for name, digest in known.source_of(kind).items()}
    assert now == known.SOURCE, (
        "the source of a part has changed: see that modules/fused/lora_block.py still computes the same, then write "
        "into modules/fused/known.py:\n" + "".join(f'    "{name}": "{digest}",\n' for name, digest in now.items())
    )


def test_comments_are_no_edit(monkeypatch):
    def forward(self, x):
        """Another docstring."""
        # At least float32.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(
            wide.square().mean(-1, keepdim=True) + self.eps,
        )
        return self.weight.to(x.dtype) * wide.to(x.dtype)

    forward.__qualname__, forward.__globals__["torch"] = "RMSNorm.forward", norm.torch
    monkeypatch.setattr(RMSNorm, "forward", forward)
    assert why_plain(make_model()) is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["fast", "lean", "offload"])
def test_a_copy_computes_with_its_own_weights(mode, fused):
    ids, layout = ids_and_layout(False)
    model = make_model()
    checkpoint_activations(model, mode, fused=fused)
    expected, _ = loss_and_gradients(model, layout, ids)
    for twin in (copy.deepcopy(model), AveragedModel(model).module):
        assert loss_and_gradients(twin, layout, ids)[0] == expected
        with torch.no_grad():
            for layer in twin.modules():
                if isinstance(layer, LoRALinear):
                    layer.lora_B.weight.zero_()
        assert abs(loss_and_gradients(twin, layout, ids)[0] - expected) > 1e-3
        assert loss_and_gradients(model, layout, ids)[0] == expected


def scale(model):
    model.blocks[1].self_attn.q_proj.alpha *= 3


def another_norm(model):
    model.blocks[1].input_layernorm = RMSNorm(32, 0.5)


def other_adapters(model):
    adapters = {name: p * 1.5 for name, p in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(adapters, strict=False, assign=True)


@pytest.mark.parametrize("change", [scale, another_norm, other_adapters])
def test_a_change_after_the_choice_is_not_ignored(change):
    ids, layout = ids_and_layout(False)
    results = []
    for fused in (True, False):
        model = make_model()
        checkpoint_activations(model, "lean", fused=fused)
        before, _ = loss_and_gradients(model, layout, ids)
        change(model)
        results.append(loss_and_gradients(model, layout, ids))
        assert abs(results[-1][0] - before) > 1e-3
    (loss, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
