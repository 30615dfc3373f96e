"""LoRA of embedding and head, and layers of unequal rank, against peft."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from checkpointing.adapters import load_adapter, save_adapter
from modules.adapters.lora import add_lora, lora_layers
from modules.adapters.lora_embedding import LoRAEmbedding
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from modules.adapters.parts import modules_of
from modules.adapters.peft_names import read_pattern
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft, logits, train, trained

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [TARGETS, [*TARGETS, "lm_head"]])
@pytest.mark.parametrize("settings", [dict(lora_alpha=8), dict(lora_alpha=4, use_rslora=True)])
def test_follows_peft(tmp_path, targets, tied, settings):
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings)
    ours, _ = assert_follows_peft(tmp_path, config, lr=1e-3, tie_word_embeddings=tied)
    assert isinstance(ours.model.embed_tokens, LoRAEmbedding)
    saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert saved.keys() == {key for key in again if ".base_layer." not in key}


def test_ranks_and_alphas_by_pattern(tmp_path):
    patterns = dict(rank_pattern={"down_proj": 6, "embed_tokens": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 32})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **patterns)
    ours, _ = assert_follows_peft(tmp_path, config, lr=1e-3)
    saved = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)
    assert saved["rank_pattern"] == patterns["rank_pattern"]
    assert saved["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 32}
    _, made = make_pair(tmp_path / "made")
    add_lora(made, rank=4, alpha=8, targets=TARGETS, **patterns)
    layers, again = ({**lora_layers(model), **modules_of(model, LoRAEmbedding)} for model in (ours, made))
    assert {n: (m.rank, m.alpha) for n, m in layers.items()} == {n: (m.rank, m.alpha) for n, m in again.items()}


@pytest.mark.parametrize("method", ["lora", "lora-fa", "lora-plus", "pissa", "olora"])
def test_patterns_are_saved_by_every_relative(tmp_path, method):
    _, model = make_pair(tmp_path / "base")
    patterns = dict(rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 16.0})
    add_method(model, method, Options(rank=4, alpha=8.0, targets=("q_proj", "k_proj", "down_proj"), **patterns))
    train(model, torch.optim.AdamW(trained(model).values(), lr=3e-3), steps=2)
    save_adapter(tmp_path / "adapter", model, base=str(tmp_path / "base"))
    fresh = load(tmp_path / "base")
    load_adapter(fresh, tmp_path / "adapter")
    assert (logits(fresh) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["dora", "pissa", "olora", "vera"])
def test_methods_without_a_form_for_embeddings_say_so(tmp_path, method):
    _, model = make_pair(tmp_path)
    with pytest.raises(ValueError, match="embed_tokens is an embedding, for which .*Linear has no form"):
        add_method(model, method, Options(rank=4, targets=("q_proj", "embed_tokens")))


def test_bad_patterns_are_explained(tmp_path):
    _, model = make_pair(tmp_path)
    assert read_pattern("--rank-pattern", ["q_proj=8", "layers.0.mlp.up_proj=2"], int) == {
        "q_proj": 8,
        "layers.0.mlp.up_proj": 2,
    }
    for item in ("q_proj", "=8", "q_proj=0", "q_proj=x", "(=3"):
        with pytest.raises(ValueError, match="is not NAME=NUMBER"):
            read_pattern("--rank-pattern", [item], int)
    with pytest.raises(ValueError, match="--rank-pattern up_proj names no layer that --targets names"):
        add_lora(model, targets=("q_proj",), rank_pattern={"up_proj": 3})
    with pytest.raises(ValueError, match="--method ia3 has no such layers"):
        add_method(model, "ia3", Options(rank_pattern={"q_proj": 3}))
    with pytest.raises(ValueError, match="eva divides"):
        add_method(model, "eva", Options(alpha_pattern={"q_proj": 3}, batches=[1]))
