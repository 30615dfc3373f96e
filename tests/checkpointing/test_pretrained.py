"""Weights in and out: strictness, dtypes, shards, the Hub."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpointing import export
from checkpointing.pretrained import WeightFiles, find_checkpoint, load_weights, read_config
from models import build_model
from models.llama import PRESETS
from modules.adapters.lora import add_lora
from modules.quantization.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4, quantize_nf4_tensor
from tests.tiny import make_checkpoint

CPU = torch.device("cpu")


def load(folder, dtype=torch.float32, nf4=False):
    model = build_model(read_config(folder))
    if nf4:
        quantize_nf4(model)
    load_weights(model, WeightFiles(folder), device=CPU, dtype=dtype)
    return model


def test_round_trip_is_bit_identical(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    for shard_bytes in (10**9, 20_000):
        monkeypatch.setattr(export, "SHARD_BYTES", shard_bytes)
        out = tmp_path / str(shard_bytes)
        out.mkdir()
        export.save_model(out, load(tmp_path / "base"), config=read_config(tmp_path / "base"), source=tmp_path / "base")
        written = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
        original = load_file(tmp_path / "base/model.safetensors")
        assert written.keys() == original.keys()
        assert all(torch.equal(written[k], original[k]) for k in original)
        assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
        load(out)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_an_adapter_on_one_side_of_a_tie_unties(tmp_path, targets):
    make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    model = load(tmp_path / "base")
    add_lora(model, rank=4, targets=targets)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(0, 0.1)
    (tmp_path / "out").mkdir()
    config = read_config(tmp_path / "base")
    export.save_model(tmp_path / "out", model, config=config, source=tmp_path / "base")
    ids = torch.randint(0, 300, (2, 12))
    again = load(tmp_path / "out")
    assert not again.config.tie_word_embeddings
    assert (again.logits(again(ids)) - model.logits(model(ids))).abs().max() < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (theirs(ids).logits - model.logits(model(ids))).abs().max() < 1e-5


def test_one_block_is_complete_before_the_next(tmp_path):
    """Streamed weights leave block by block, so the order is the model's, whatever the files' is."""
    make_checkpoint(tmp_path, num_hidden_layers=12)  # by name, block 10 comes before block 2
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(tensors)}  # every block in both files
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model, placed = build_model(read_config(tmp_path)), []

    def note(name):
        assert not model.get_parameter(name).is_meta
        placed.append(name)

    load_weights(model, WeightFiles(tmp_path), device=CPU, dtype=torch.float32, placed=note)
    assert sorted(placed) == sorted(tensors)
    blocks = [int(name.split(".")[2]) for name in placed if ".layers." in name]
    assert blocks == sorted(blocks)
    assert all(torch.equal(p, tensors[name]) for name, p in model.state_dict().items())


def test_cast_and_quantised_on_the_way(tmp_path):
    reference = make_checkpoint(tmp_path)
    half = load(tmp_path, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    quantised = load(tmp_path, nf4=True)
    for name, p in quantised.named_parameters():
        dense = reference.get_parameter(name)
        if isinstance(p, NF4Tensor):
            assert not p.requires_grad
            assert torch.equal(dequantize_nf4(p), dequantize_nf4(quantize_nf4_tensor(dense)))
        else:
            assert torch.equal(p, dense)
    names = {name for name, p in quantised.named_parameters() if isinstance(p, NF4Tensor)}
    assert len(names) == 14 and "lm_head.weight" not in names


def test_one_error_lists_everything(tmp_path):
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old exports have it: no error
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert str(error.value).partition("config.json: ")[2].split("; ") == [
        "2 missing: model.layers.0.mlp.up_proj.weight, model.norm.weight",
        "1 not used by this model: extra.weight",
        "1 of another shape: model.layers.1.self_attn.q_proj.weight: (4, 4), expected (32, 32)",
    ]


def test_a_tied_head_on_disk_is_accepted(tmp_path):
    reference = make_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)


def test_pickles_quantised_checkpoints_and_missing_shards_are_refused(tmp_path):
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="gptq"):
        read_config(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors"):
        WeightFiles(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        WeightFiles(tmp_path)


def test_fingerprint_changes_with_the_weights(tmp_path):
    make_checkpoint(tmp_path / "a")
    make_checkpoint(tmp_path / "b")
    make_checkpoint(tmp_path / "c", seed=1)
    a, b, c = (WeightFiles(tmp_path / name).fingerprint() for name in "abc")
    assert a == b != c


def test_what_is_no_checkpoint_is_named_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    def download(*_, **__):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match="org/model.*We couldn't connect$"):
        find_checkpoint("org/model")
    for name in ("./nowhere", "nowhere", "/no/where"):
        with pytest.raises(ValueError, match="does not exist"):
            find_checkpoint(name)
    with pytest.raises(ValueError, match="is a file"):
        find_checkpoint(__file__)
    (tmp_path / "model.Q4_K_M.gguf").touch()
    for name in (tmp_path, tmp_path / "model.Q4_K_M.gguf"):
        with pytest.raises(ValueError, match=r"is a GGUF file; .* gguf_file=NAME"):
            find_checkpoint(name)
    known = "LlamaForCausalLM, LlavaForConditionalGeneration, Idefics3ForConditionalGeneration, SmolVLM"
    for config, named in [
        ({"architectures": ["Gemma"]}, "architecture 'Gemma'"),
        ({"model_type": "x"}, "model_type 'x'"),
    ]:
        with pytest.raises(ValueError, match=f"{named} in config.json is not supported; supported: {known}"):
            build_model(config)
    assert type(build_model(PRESETS["llama-3.2-1b"] | {"model_type": "llama"})).__name__ == "LlamaForCausalLM"


def test_loading_leaves_no_mapping(tmp_path):
    """A mapping counts as the process's memory as long as it is there; a large file is mapped piece by piece."""
    make_checkpoint(tmp_path)
    weights, model = WeightFiles(tmp_path), build_model(read_config(tmp_path))
    load_weights(model, weights, device=CPU, dtype=torch.float32)
    assert weights.fingerprint() and "model.norm.weight" in weights
    if Path("/proc/self/maps").is_file():
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
