"""A window in the layout against transformers' Mistral: logits, gradients, packed rows, generation, in float32."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from models import build_model
from models.llama import LlamaModel
from modules.attention import packed_layout, padded_layout
from modules.generation import generate
from tests.models.test_llama import TINY

SHAPE = TINY | dict(head_dim=12, max_position_embeddings=128)
CPU = torch.device("cpu")


@pytest.fixture(params=[7, 48])
def pair(request, monkeypatch):
    """transformers' Mistral, and ours with the edit that a fork would make: the model narrows the layout."""
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, sliding_window=request.param, rope_theta=1e4, attn_implementation="eager")
    reference = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(float(p.ndim == 1), 0.15)
    ours = build_model(SHAPE | dict(architectures=["LlamaForCausalLM"], rope_theta=1e4)).to_empty(device="cpu")
    ours.load_state_dict(reference.state_dict())
    run = LlamaModel.run_embedded
    monkeypatch.setattr(
        LlamaModel,
        "run_embedded",
        lambda self, x, layout, caches=None: run(self, x, layout.with_window(request.param), caches),
    )
    return reference, ours.eval()


def test_padded_rows(pair):
    reference, ours = pair
    ids = torch.randint(0, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    expected = reference(ids).logits
    found = ours.logits(ours(ids, padded_layout(70).prepare(CPU, torch.float32)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    weights = [m.model.layers[0].self_attn.k_proj.weight for m in pair]
    for_reference, for_ours = (
        torch.autograd.grad(y, w, dy)[0] for y, w in zip((expected, found), weights, strict=True)
    )
    assert (for_ours - for_reference).norm() < 1e-4 * for_reference.norm()


def test_packed_rows(pair):
    reference, ours = pair
    ids = torch.randint(0, 97, (1, 130), generator=torch.Generator().manual_seed(1))
    found = ours.logits(ours(ids, packed_layout([[60, 8, 55]], 130).prepare(CPU, torch.float32)))
    for document, logits in zip(ids.split([60, 8, 55, 7], 1), found.split([60, 8, 55, 7], 1), strict=True):
        torch.testing.assert_close(logits, reference(document).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_from_prompts_longer_than_the_window(pair):
    reference, ours = pair
    prompts = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(1)).tolist(), [5, 6, 7]
    for use_cache in (True, False):
        found = generate(ours, prompts, max_new_tokens=20, use_cache=use_cache)
        for prompt, completion in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt])
            expected = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
            )
            assert completion == expected[0, len(prompt) :].tolist()


def test_a_batch_with_two_windows_is_prepared_once_for_each():
    layout = packed_layout([[5, 9]], 16).prepare(CPU, torch.float32)
    narrow = layout.with_window(3)
    assert narrow is layout.with_window(3) and layout.with_window(None) is layout
    assert layout.mask[0, 0, 4].tolist() == [True] * 5 + [False] * 11
    assert narrow.mask[0, 0, 4].tolist() == [False] * 2 + [True] * 3 + [False] * 11
