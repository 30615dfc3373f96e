"""What a batch's layout says, and that attention obeys it. The models' tests compare the numbers."""

import pytest
import torch

from modules.attention import packed_layout, padded_layout, uses_varlen

CPU = torch.device("cpu")


def test_packed_layout_describes_rows_documents_and_padding():
    layout = packed_layout([[3, 2], [4, 2]], 6)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert layout.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]]
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 6, 10, 12]
    assert layout.longest == 4
    mask = layout.prepare(CPU, torch.float32).mask
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_padded_layout_needs_no_mask():
    layout = padded_layout(5).prepare(CPU, torch.float32)
    assert layout.mask is None and layout.cu_seqlens is None
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert not uses_varlen(CPU, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads, head_dim", [(8, 64), (2, 64), (2, 20)])
def test_variable_length_kernel_equals_the_mask(kv_heads, head_dim):
    from models import build_model

    config = dict(vocab_size=1000, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8)
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = build_model(
        config | dict(num_key_value_heads=kv_heads, head_dim=head_dim, architectures=["LlamaForCausalLM"])
    )
    model = model.to_empty(device=device).bfloat16()
    model.init_weights()
    ids = torch.randint(0, 1000, (2, 256), device=device)
    layout = packed_layout([[100, 50, 30], [256]], 256)
    upstream = torch.randn(2, 256, 512, device=device)
    results = []
    for dtype in (torch.bfloat16, torch.float32):  # float32 has no variable-length kernel: the mask
        prepared = layout.prepare(device, dtype)
        assert (prepared.mask is None) == (dtype == torch.bfloat16)
        hidden = model(ids, prepared).float()
        weight = model.blocks[0].self_attn.k_proj.weight
        (gradient,) = torch.autograd.grad(hidden, weight, upstream)
        results.append((hidden.detach(), gradient.float()))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
