"""merge.py for every method that a plain weight can stand for: what transformers computes with the result."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from checkpointing.adapters import save_adapter
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from models import build_model
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from modules.adapters.switch import adapted_layers, base_layer
from modules.adapters.token_rows import train_token_rows
from modules.adapters.vocabulary import grow_vocabulary
from modules.adapters.whole_modules import train_whole_modules
from modules.quantization.nf4 import NF4Linear, quantize_nf4
from tests.modules.adapters.every_method import MERGEABLE, UNMERGEABLE, batches, move
from tests.tiny import make_checkpoint, run_recipe

CPU = torch.device("cpu")


def ids():
    return torch.arange(4, 60)[None]


def load(folder, nf4=False):
    model = build_model(read_config(folder))
    if nf4:
        quantize_nf4(model)
    load_weights(model, WeightFiles(folder), device=CPU, dtype=torch.float32)
    return model


def adapter(folder, name, *, nf4=False, **options):
    """A folder with an adapter away from its start, and the model that has it."""
    model = load(folder / "base", nf4)
    kind = NF4Linear if name == "loftq" else None
    options = Options(rank=4, alpha=8.0, quantize=kind, batches=batches(), **options)
    add_method(model, name, options)
    if name == "loftq":
        quantize_nf4(model)
    move(model)
    save_adapter(folder / "adapter", model, base=str(folder / "base"))
    return model


@torch.no_grad()
def logits(model):
    return model.logits(model(ids())) if hasattr(model, "logits") else model(ids()).logits


def merge(folder, *flags, check=True):
    flags = ("--model", folder / "base", "--adapter", folder / "adapter", "--output", folder / "merged", *flags)
    return run_recipe("merge", *flags, check=check)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", [name for name in MERGEABLE if name != "loftq"])
def test_every_mergeable_method(tmp_path, name, biases):
    reference = make_checkpoint(tmp_path / "base", attention_bias=biases, mlp_bias=biases)
    if biases:
        with torch.no_grad():
            for key, p in reference.named_parameters():
                if key.endswith("bias"):
                    p.normal_()
        reference.save_pretrained(tmp_path / "base")
    before = hashlib.sha256((tmp_path / "base/model.safetensors").read_bytes()).digest()
    expected = logits(adapter(tmp_path, name))
    done = merge(tmp_path)
    assert done.stdout == ""
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() < 1e-5
    assert (logits(merged) - logits(reference)).abs().max() > 1e-2
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 1e-5
    assert merged.config.attention_bias == (biases or name == "bitfit")
    assert hashlib.sha256((tmp_path / "base/model.safetensors").read_bytes()).digest() == before


@pytest.mark.parametrize("name", UNMERGEABLE)
def test_the_others_say_so(tmp_path, name):
    make_checkpoint(tmp_path / "base")
    adapter(tmp_path, name)
    done = merge(tmp_path, check=False)
    assert done.returncode == 2 and "cannot be merged" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "merged").exists()


def test_some_biases_bring_all(tmp_path):
    """transformers has biases on all of attention or on none of it."""
    make_checkpoint(tmp_path / "base")
    expected = logits(adapter(tmp_path, "bitfit", targets=("q_proj",)))
    merge(tmp_path)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["attention_bias"] is True and config["mlp_bias"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() < 1e-5
    assert merged.model.layers[0].self_attn.q_proj.bias.any() and not merged.model.layers[0].self_attn.o_proj.bias.any()
    (tmp_path / "head").mkdir()
    make_checkpoint(tmp_path / "head/base")
    adapter(tmp_path / "head", "bitfit", targets=("lm_head",))
    done = merge(tmp_path / "head", check=False)
    assert done.returncode == 2 and "lm_head got a bias" in done.stderr


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3", "bitfit", "ln"])
def test_a_bfloat16_checkpoint_stays_one(tmp_path, name):
    make_checkpoint(tmp_path / "base").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    expected = logits(adapter(tmp_path, name))
    merge(tmp_path)
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            assert {handle.get_tensor(key).dtype for key in handle.keys()} == {torch.bfloat16}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).norm() < 0.02 * expected.norm()
    run_recipe(
        *("merge", "--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "wide"),
        *("--dtype", "float32"),
    )
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert (logits(wide) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["lora", "dora", "loftq", "ia3"])
def test_over_nf4_with_what_quantising_again_would_do(tmp_path, name):
    make_checkpoint(tmp_path / "base")
    model = adapter(tmp_path, name, nf4=name != "loftq")
    done = merge(tmp_path, "--quantize", "nf4")
    assert (logits(load(tmp_path / "merged")) - logits(model)).abs().max() < 1e-5
    report = json.loads(done.stdout)["requantised"]
    again, dense = load(tmp_path / "merged", nf4=True), load(tmp_path / "merged")
    layers = adapted_layers(model)
    assert report.keys() == {path.rpartition(".")[2] for path in layers}
    for kind, found in report.items():
        of_weight, of_change = {}, {}
        for path in (path for path in layers if path.endswith(kind)):
            M, W = dense.get_submodule(path).weight, base_layer(layers[path]).dense_weight()
            off = (again.get_submodule(path).dense_weight() - M).norm()
            of_weight[path], of_change[path] = (off / M.norm()).item(), (off / (M - W).norm()).item()
        assert found["layers"] == len(of_weight) == 2
        assert found["of_weight"] == pytest.approx(sum(of_weight.values()) / 2, rel=1e-4)
        assert found["of_change"] == pytest.approx(sum(of_change.values()) / 2, rel=1e-3)
        assert found["worst_layer"] == max(of_weight, key=of_weight.get)
        assert found["worst_of_weight"] == pytest.approx(max(of_weight.values()), rel=1e-4)


def test_modules_trained_in_full_and_an_untied_head(tmp_path):
    make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    model = load(tmp_path / "base")
    add_method(model, "lora", Options(rank=4, targets=("q_proj",)))
    train_whole_modules(model, ["lm_head", "model.norm"])
    move(model)
    save_adapter(tmp_path / "adapter", model, base="base")
    before = hashlib.sha256((tmp_path / "base/model.safetensors").read_bytes()).digest()
    merge(tmp_path)
    assert hashlib.sha256((tmp_path / "base/model.safetensors").read_bytes()).digest() == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_and_an_adapted_embedding(tmp_path, tied):
    """Rows that the base lacks, trained alone; and an embedding with a LoRA, whose tied head stays what it was."""
    make_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    model = load(tmp_path / "base")
    add_method(model, "lora", Options(rank=4, targets=("q_proj",)))
    rows = model.config.vocab_size
    grow_vocabulary(model, rows + 2)
    train_token_rows(model, [rows, rows + 1])
    move(model)
    save_adapter(tmp_path / "adapter", model, base="base")
    merge(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == rows + 2 and merged.config.tie_word_embeddings == tied
    assert (logits(merged) - logits(model)).abs().max() < 1e-5

    model = load(tmp_path / "base")
    add_method(model, "lora", Options(rank=4, targets=("embed_tokens", "up_proj")))
    move(model)
    (tmp_path / "second").mkdir()
    (tmp_path / "base").rename(tmp_path / "second/base")
    save_adapter(tmp_path / "second/adapter", model, base="base")
    merge(tmp_path / "second")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "second/merged")
    assert (logits(merged) - logits(model)).abs().max() < 1e-5 and not merged.config.tie_word_embeddings


def test_an_adapter_of_another_model_is_refused(tmp_path):
    make_checkpoint(tmp_path / "base")
    adapter(tmp_path, "lora")
    make_checkpoint(tmp_path / "base", hidden_size=16, intermediate_size=48)
    done = merge(tmp_path, check=False)
    assert done.returncode == 2 and "does not fit this model" in done.stderr and not (tmp_path / "merged").exists()
