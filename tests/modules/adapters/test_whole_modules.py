"""Modules trained in full beside an adapter, against peft's modules_to_save."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from checkpointing.adapters import load_adapter, save_adapter
from models.llama import LlamaForCausalLM
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from modules.adapters.vocabulary import is_tied
from modules.adapters.whole_modules import train_whole_modules
from modules.fused.blocks import disagreement, why_plain
from modules.loss import linear_cross_entropy
from modules.quantization.nf4 import quantize_nf4
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft, ids, logits, loss_of, train, trained
from tests.recipes.test_vlm import make_llava

EVERYTHING = ["lm_head", "embed_tokens", "model.norm"]
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def make(folder, names, *, method="lora", **overrides):
    _, model = make_pair(folder, **overrides)
    torch.manual_seed(1)
    add_method(model, method, Options(rank=4, alpha=8.0))
    return model, train_whole_modules(model, names)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [EVERYTHING, ["lm_head"], ["embed_tokens"], ["norm"]])
def test_follows_peft(tmp_path, names, tied):
    # Adam turns a rounding error in a gradient near 0 into one of the size of lr: an embedding has such gradients.
    config = LoraConfig(**LORA, modules_to_save=names)
    lr = 1e-3 if "embed_tokens" in names else 3e-3
    assert_follows_peft(tmp_path, config, lr=lr, tie_word_embeddings=tied)
    saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert saved.keys() == again.keys()


def test_a_name_means_a_module_not_the_end_of_one(tmp_path):
    model, names = make(tmp_path, ["norm", "layers.1.input_layernorm"])
    assert names == ["model.layers.1.input_layernorm", "model.norm"]
    whole = {name for name in trained(model) if ".lora_" not in name}
    assert whole == {f"{name}.weight" for name in names}
    save_adapter(tmp_path / "adapter", model, base=str(tmp_path))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] == names


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "bitfit", "parallel"])
def test_beside_other_methods(tmp_path, method):
    model, _ = make(tmp_path / "base", EVERYTHING, method=method, tie_word_embeddings=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, torch.optim.AdamW(trained(model).values(), lr=3e-3), steps=4)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    assert not is_tied(model) and not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    save_adapter(tmp_path / "adapter", model, base=str(tmp_path / "base"))
    fresh = load(tmp_path / "base")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


def test_the_fused_block_stays(tmp_path):
    """What is trained outside the blocks is no business of theirs."""
    model, _ = make(tmp_path / "a", EVERYTHING, num_attention_heads=4)
    assert why_plain(model) is None and disagreement(model) is None
    model, _ = make(tmp_path / "b", ["post_attention_layernorm"])
    assert "no adapter" in why_plain(model)


def test_bfloat16_modules_stay_bfloat16(tmp_path):
    _, model = make_pair(tmp_path)
    model.bfloat16()
    add_method(model, "lora", Options(rank=4))
    train_whole_modules(model, ["norm"])
    loss_of(model, ids()).backward()
    assert model.model.norm.weight.grad.dtype == torch.bfloat16


def test_what_cannot_be_trained_is_explained(tmp_path):
    _, model = make_pair(tmp_path)
    quantize_nf4(model)
    add_method(model, "lora", Options(rank=4, targets=("q_proj", "lm_head")))
    for names, words in (
        (["norm", "lm_haed"], "lm_haed names no module; the model has .*lm_head"),
        (["nrom", "lm_haed"], "nrom, lm_haed name no module"),
        (["lm_head"], "lm_head.lora_A.weight belongs to an adapter; leave its module out of the targets"),
        (["k_proj"], "NF4Linear cannot be trained"),
    ):
        with pytest.raises(ValueError, match=words):
            train_whole_modules(model, names)
    model.half()
    with pytest.raises(ValueError, match="float16"):
        train_whole_modules(model, ["norm"])


def test_saved_modules_that_do_not_fit_are_named(tmp_path):
    model, _ = make(tmp_path / "base", ["norm"])
    save_adapter(tmp_path / "adapter", model, base="base")
    make_pair(tmp_path / "other", hidden_size=96)
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(load(tmp_path / "other"), tmp_path / "adapter")


class Classifier(LlamaForCausalLM):
    """A Llama that says which of three classes a text is of, at its last token."""

    @property
    def head(self):
        return self.score


def test_a_new_head_trains_and_opens_in_transformers_and_peft(tmp_path):
    make_pair(tmp_path / "base")
    model = load(tmp_path / "base")
    model.__class__ = Classifier
    add_method(model, "lora", Options(rank=4, alpha=8.0))
    torch.manual_seed(1)
    model.score = torch.nn.Linear(model.config.hidden_size, 3, bias=False)
    assert train_whole_modules(model, ["score"]) == train_whole_modules(model, ["score"]) == ["score"]
    optimizer, labels = torch.optim.AdamW(trained(model).values(), lr=3e-3), torch.tensor([[2], [0]])
    for _ in range(4):
        loss = linear_cross_entropy(model(ids())[:2, -1:], model, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = tmp_path / "adapter"
    save_adapter(adapter, model, base=str(tmp_path / "base"), task_type="SEQ_CLS")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]

    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    theirs = PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        assert (theirs(ids()).logits - model.logits(model(ids())[:, -1])).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")  # lists `classifier`, too
    again = load(tmp_path / "base")
    again.__class__ = Classifier
    again.score = torch.nn.Linear(model.config.hidden_size, 3, bias=False)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))
    for folder in (adapter, tmp_path / "theirs"):
        with pytest.raises(ValueError, match="trained with a module `score` that this model does not have"):
            load_adapter(load(tmp_path / "base"), folder)


VISION_LANGUAGE = {
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "whole": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "multi_modal_projector"]),
    "rows": dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [3, 9]}),
}


def save_moved(folder, theirs):
    """A peft model's adapter away from its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in trained(theirs).values():
            p.add_(torch.randn_like(p) * 0.05)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("what", VISION_LANGUAGE)
def test_on_a_vision_language_model(tmp_path, what):
    """There the same modules have longer names; what lies beside an adapter opens both ways."""
    theirs = make_llava(tmp_path / "base")
    base = copy.deepcopy(theirs)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **VISION_LANGUAGE[what])
    theirs = save_moved(tmp_path / "theirs", get_peft_model(theirs, config))
    ours = load(tmp_path / "base")
    load_adapter(ours, tmp_path / "theirs")
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    got = ours.logits(ours(tokens))
    assert (got - theirs(input_ids=tokens).logits).abs().max() < 1e-5
    save_adapter(tmp_path / "ours", ours, base=str(tmp_path / "base"))
    opened = PeftModel.from_pretrained(base, tmp_path / "ours")
    assert (got - opened(input_ids=tokens).logits).abs().max() < 1e-5


TIED_BY_PEFT = {
    "targets": dict(target_modules=["q_proj", "embed_tokens"]),
    "whole": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "rows": dict(target_modules=["q_proj"], trainable_token_indices=[3, 9]),
}


@pytest.mark.parametrize("what", TIED_BY_PEFT)
def test_what_peft_trained_as_one_opens(tmp_path, what):
    """With ensure_weight_tying embedding and head stay the same matrix; here they open as two equal ones, or as one."""
    reference, ours = make_pair(tmp_path / "base", tie_word_embeddings=True)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", ensure_weight_tying=True, **TIED_BY_PEFT[what])
    theirs = save_moved(tmp_path / "theirs", get_peft_model(copy.deepcopy(reference), config))
    load_adapter(ours, tmp_path / "theirs")
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    save_adapter(tmp_path / "ours", ours, base="base")
    assert (logits(PeftModel.from_pretrained(reference, tmp_path / "ours")) - logits(ours)).abs().max() < 1e-5
