"""LoRA against peft: outputs, which modules are adapted (training: test_lora_embedding.py)."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from checkpointing.adapters import load_adapter, read_adapter, save_adapter
from modules.adapters.lora import ALL_LINEAR, add_lora, lora_layers
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import logits


def randomise(model):
    """Adapters away from their start, where B = 0 hides everything."""
    generator = torch.Generator().manual_seed(4)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B.weight.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj"), ("mlp.down_proj",), ("lm_head", "o_proj")])
def test_saved_adapter_opens_in_peft(tmp_path, targets):
    reference, ours = make_pair(tmp_path / "base")
    add_lora(ours, rank=4, alpha=8.0, targets=targets)
    randomise(ours)
    save_adapter(tmp_path / "adapter", ours, base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(lora_layers(ours))
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    assert sum(p.requires_grad for p in ours.parameters()) == 2 * len(adapted)


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]),
        dict(r=4, lora_alpha=3, target_modules="all-linear", use_rslora=True),
        dict(r=8, lora_alpha=8, target_modules=r".*layers\.1\..*\.(k|v)_proj"),
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj"],
            rank_pattern={"k_proj": 2},
            alpha_pattern={"layers.0.self_attn.q_proj": 32},
        ),
    ],
)
def test_peft_adapter_opens_here(tmp_path, settings):
    reference, ours = make_pair(tmp_path / "base")
    theirs = get_peft_model(reference, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    # and what we write from it is the same adapter again
    save_adapter(tmp_path / "again", ours, base="base")
    first, again = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    _, fresh = make_pair(tmp_path / "base")
    load_adapter(fresh, tmp_path / "again")
    assert torch.equal(logits(fresh), logits(ours))


def test_wrong_adapters_are_explained(tmp_path):
    reference, ours = make_pair(tmp_path / "base")
    make = dict(target_modules=["q_proj"], task_type="CAUSAL_LM")
    biased = LoraConfig(lora_bias=True, **make)
    get_peft_model(copy.deepcopy(reference), biased).save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match="lora_bias"):
        load_adapter(ours, tmp_path / "biased")
    other, _ = make_pair(tmp_path / "other", hidden_size=24, num_hidden_layers=3)
    get_peft_model(other, LoraConfig(**make)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"layers.2.self_attn.q_proj \(no such"):
        load_adapter(ours, tmp_path / "adapter")
    whole, _ = make_pair(tmp_path / "other")
    get_peft_model(whole, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "whole")
    _, narrow = make_pair(tmp_path / "narrow", hidden_size=24)
    words = r"down_proj.lora_B.weight is \(48, 8\), expected \(24, 8\), .* and 19 more$"
    with pytest.raises(ValueError, match=words) as caught:
        load_adapter(narrow, tmp_path / "whole")
    assert str(caught.value).count("expected") == 3
    with pytest.raises(ValueError, match="not a folder"):
        load_adapter(ours, tmp_path / "nothing")
    path = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    for name, value in (("lora_alpha", None), ("init_lora_weights", "pissa")):  # peft changes the base for the latter
        path.write_text(json.dumps({key: v for key, v in (settings | {name: value}).items() if v is not None}))
        with pytest.raises(ValueError, match="pissa.*base weights" if value else name):
            read_adapter(tmp_path / "adapter")
    path.write_text(json.dumps(settings))
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(ours, tmp_path / "adapter")


def test_bad_options_are_explained(tmp_path):
    _, ours = make_pair(tmp_path)
    for options, word in [
        (dict(rank=0), "--rank 0"),
        (dict(dropout=1.0), "--dropout"),
        (dict(targets=("q_prj", "v_proj")), "--targets q_prj names no linear layer"),
        (dict(targets=("q_prj", "v_prj")), "--targets q_prj, v_prj name no linear layer"),
        (dict(targets=()), "empty"),
    ]:
        with pytest.raises(ValueError, match=word):
            add_lora(ours, **options)
