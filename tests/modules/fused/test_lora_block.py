"""The memory-saving block against the one by the formulas, and that one against autograd."""

import pytest
import torch

from modules.attention import packed_layout, padded_layout
from modules.fused import lora_block
from modules.fused.block_by_formula import block_by_formula
from modules.fused.blocks import FusedBlocks, choose_blocks
from tests.modules.memory.test_activations import make_model

CASES = {
    "all layers": {},
    "some layers": dict(targets=("q_proj", "v_proj", "down_proj")),
    "nf4": dict(nf4=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "biases, nf4": dict(attention_bias=True, mlp_bias=True, nf4=True),
    "biases, some layers": dict(attention_bias=True, mlp_bias=True, targets=("k_proj", "up_proj", "o_proj")),
    "one bias in three": dict(attention_bias=True, without=("k_proj", "v_proj", "o_proj")),
    "Qwen2": dict(attention_bias=True, without=("o_proj",)),
}


def make(without=(), **changes):
    model = make_model(**changes)
    for block in model.blocks:
        for name in without:
            getattr(block.self_attn, name).bias = None
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formulas(case, side_by_side, packed, monkeypatch):
    monkeypatch.setattr(lora_block, "TILE_BYTES", 16 * 3 * 48 * 4)
    monkeypatch.setattr(lora_block, "WORKSPACE_BYTES", 1)
    model = make(**CASES[case])
    assert choose_blocks(model) is None
    layout = packed_layout([[5, 9, 7], [12, 4]], 21) if packed else padded_layout(21)
    layout = layout.prepare(torch.device("cpu"), torch.float32)
    inputs = (*model.model.rotary(layout.positions, layout.longest, torch.float32), layout)
    x, dy = torch.randn(2, 2, 21, 32, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    block = model.blocks[1]
    adapters = [p for p in block.parameters() if p.requires_grad]
    with torch.no_grad():
        y, dx, grads = block_by_formula(block, x, *inputs, dy)
    plain = block(x, *inputs)
    fused = FusedBlocks(model)
    if side_by_side:
        fused.put_weights_side_by_side()
    saving = fused.run(block, x, *inputs, keep="lean", bind=lambda block: None)
    for out in (plain, saving):
        got = [out, *torch.autograd.grad(out, [x, *adapters], dy)]
        for a, b in zip(got, [y, dx, *grads], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
