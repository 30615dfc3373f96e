"""LoRA against peft: outputs, gradients, merging, which modules are adapted."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from checkpointing.adapters import load_adapter, save_adapter
from modules.adapters.lora import ALL_LINEAR, add_lora, lora_layers, merge_lora
from modules.quantization.nf4 import quantize_nf4
from tests.models.test_llama import make_pair


def logits(model, ids):
    return model.logits(model(ids))


def ids():
    return torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(3))


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
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(lora_layers(ours))
    expected = theirs(ids()).logits
    got = logits(ours, ids())
    assert (got - expected).abs().max() < 1e-5
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream)
    theirs_grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    ours_grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(theirs_grads) == len(ours_grads) == 2 * len(adapted)
    for name, gradient in ours_grads.items():
        peft_name = "base_model.model." + name.replace(".weight", ".default.weight")
        torch.testing.assert_close(gradient, theirs_grads[peft_name], rtol=1e-4, atol=1e-4)


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
    assert (logits(ours, ids()) - theirs(ids()).logits).abs().max() < 1e-5
    # and what we write from it is the same adapter again
    save_adapter(tmp_path / "again", ours, base="base")
    first, again = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    _, fresh = make_pair(tmp_path / "base")
    load_adapter(fresh, tmp_path / "again")
    assert torch.equal(logits(fresh, ids()), logits(ours, ids()))


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
    words = r"layers.0.mlp.down_proj \(.*layers.0.mlp.up_proj \(.* and 11 more$"
    with pytest.raises(ValueError, match=words) as caught:
        load_adapter(narrow, tmp_path / "whole")
    assert str(caught.value).count("expected") == 3
    with pytest.raises(ValueError, match="not a folder"):
        load_adapter(ours, tmp_path / "nothing")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(ours, tmp_path / "adapter")


@pytest.mark.parametrize("nf4", [False, True])
def test_starts_at_the_base_and_merges(tmp_path, nf4):
    _, ours = make_pair(tmp_path)
    if nf4:
        quantize_nf4(ours)
    base = logits(ours, ids())
    add_lora(ours, rank=4, alpha=8.0)
    assert torch.equal(logits(ours, ids()), base)
    randomise(ours)
    adapted = logits(ours, ids())
    assert (adapted - base).abs().max() > 0.1
    merge_lora(ours)
    assert not lora_layers(ours)
    assert (logits(ours, ids()) - adapted).abs().max() < 1e-4


def test_dropout_only_while_training(tmp_path):
    _, ours = make_pair(tmp_path)
    add_lora(ours, rank=4, dropout=0.5)
    randomise(ours)
    ours.train()
    assert not torch.equal(logits(ours, ids()), logits(ours, ids()))
    ours.eval()
    assert torch.equal(logits(ours, ids()), logits(ours, ids()))


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
