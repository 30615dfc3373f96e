"""PiSSA and OLoRA against peft; their starts; what they become on disk."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from checkpointing.adapters import load_adapter, read_adapter, read_folder, save_adapter
from modules.adapters.lora import lora_layers
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from modules.fused.blocks import disagreement, why_plain
from modules.quantization.nf4 import NF4Linear, dequantize_nf4, quantize_nf4_tensor
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import adamw, assert_follows_peft, logits, train

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
METHODS = ("pissa", "olora")


@pytest.mark.parametrize("method", METHODS)
def test_follows_peft(tmp_path, method):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=method, task_type="CAUSAL_LM")
    ours, theirs = assert_follows_peft(tmp_path, config)
    for name, layer in lora_layers(ours).items():  # the same residual
        other = theirs.get_submodule(f"base_model.model.{name}").base_layer.weight
        torch.testing.assert_close(layer.weight, other, rtol=0, atol=1e-6)
    assert why_plain(ours) is None and disagreement(ours) is None


@pytest.mark.parametrize("method", METHODS)
def test_starts_at_the_base_and_saves_a_plain_lora(tmp_path, method):
    reference, ours = make_pair(tmp_path / "base")
    base = logits(ours)
    add_method(ours, method, Options(rank=4, alpha=6.0, targets=TARGETS))
    assert (logits(ours) - base).abs().max() < 1e-5
    assert all(layer.lora_B.weight.abs().max() > 0.1 for layer in lora_layers(ours).values())
    save_adapter(tmp_path / "start", ours, base="base")
    started = load(tmp_path / "base")
    load_adapter(started, tmp_path / "start")
    assert (logits(started) - base).abs().max() < 1e-5  # B A - B₀ A₀ = 0

    train(ours, adamw(ours, 1e-2))
    save_adapter(tmp_path / "ours", ours, base="base")
    config, _ = read_folder(tmp_path / "ours")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12.0, True)
    assert {s["rank"] for s in read_adapter(tmp_path / "ours")[0].values()} == {8}
    opened, again = PeftModel.from_pretrained(reference, tmp_path / "ours"), load(tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    assert again.method == "lora" and (logits(ours) - base).abs().max() > 0.1
    for model in (opened, again):
        assert (logits(model) - logits(ours)).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_opens_what_peft_converted(tmp_path, method):
    """path_initial_model_for_weight_conversion, as peft's documentation has it."""
    reference, _ = make_pair(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=method, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(reference), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = method
    train(theirs, adamw(theirs, 1e-2))
    theirs.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = load(tmp_path / "base")
    load_adapter(ours, tmp_path / "lora")
    assert {layer.rank for layer in lora_layers(ours).values()} == {8}
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5


def test_pissa_takes_the_largest_part(tmp_path):
    """The residual's spectral norm is the first singular value that was left, and NF4's error falls with it."""
    torch.manual_seed(0)
    _, ours = make_pair(tmp_path)
    with torch.no_grad():  # a few large directions, as trained weights have
        for block in ours.blocks:
            block.mlp.up_proj.weight += 3 * torch.randn(80, 2) @ torch.randn(2, 48)
    weights = {name: m.weight.detach().clone() for name, m in ours.named_modules() if name.endswith("up_proj")}
    options = Options(rank=4, alpha=4.0, targets=("up_proj",), quantize=NF4Linear)
    add_method(ours, "pissa", options)
    for name, layer in lora_layers(ours).items():
        W, delta = weights[name], layer.delta().detach()
        assert torch.linalg.matrix_norm(W - delta, 2).item() == pytest.approx(
            torch.linalg.svdvals(W)[4].item(), rel=1e-4
        )
        assert (layer.dense_weight() + delta - W).norm() < 0.5 * (dequantize_nf4(quantize_nf4_tensor(W)) - W).norm()


def test_rank_beyond_the_layer_is_explained(tmp_path):
    _, ours = make_pair(tmp_path)
    with pytest.raises(ValueError, match="--rank 49 exceeds"):
        add_method(ours, "pissa", Options(rank=49))
    with pytest.raises(ValueError, match="pissa_niter_4.*base weights"):
        settings = dict(target_modules=["q_proj"], init_lora_weights="pissa_niter_4", task_type="CAUSAL_LM")
        reference, fresh = make_pair(tmp_path / "base")
        get_peft_model(reference, LoraConfig(**settings)).save_pretrained(tmp_path / "fast")
        load_adapter(fresh, tmp_path / "fast")
