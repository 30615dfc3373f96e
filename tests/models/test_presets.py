"""Presets have the sizes of the published models, and transformers' shapes."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from models import build_model, clip_vit, llama, llava, smolvlm

ORACLES = {
    llama: (LlamaForCausalLM, LlamaConfig),
    clip_vit: (CLIPVisionModel, CLIPVisionConfig),
    llava: (LlavaForConditionalGeneration, LlavaConfig),
    smolvlm: (SmolVLMForConditionalGeneration, SmolVLMConfig),
}
PUBLISHED = {"llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "llama-2-7b": 6_738_415_616}
PUBLISHED |= {"llama-3.3-70b": 70_553_706_496, "tinyllama-1.1b": 1_100_048_384, "smollm2-135m": 134_515_008}
PUBLISHED |= {"smolvlm-256m": 256_484_928, "smolvlm-500m": 507_482_304, "smolvlm-2.2b": 2_246_272_880}
PUBLISHED |= {"llava-1.5-7b": 7_063_427_072, "clip-vit-large-patch14-336": 303_507_456}
TOKENS = {"llava": 576, "smolvlm-256m": 64, "smolvlm-500m": 64, "smolvlm-2.2b": 81}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in ORACLES for name in module.PRESETS])
def test_presets(module, name):
    oracle, config = ORACLES[module]
    ours = build_model(module.PRESETS[name] | {"architectures": [oracle.__name__]})
    with torch.device("meta"):
        theirs = oracle(config(**module.PRESETS[name]))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    if name in PUBLISHED:
        assert sum(p.numel() for p in ours.parameters()) == PUBLISHED[name]
    for start, tokens in TOKENS.items():
        assert not name.startswith(start) or ours.config.tokens_per_image == tokens
    if module is clip_vit:
        assert f"patch{ours.config.patch_size}" in name
