"""LoftQ's start: closer to the weights than NF4 alone; a plain LoRA over the NF4 base on disk."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from checkpointing.adapters import load_adapter, save_adapter
from modules.adapters.lora import lora_layers
from modules.adapters.methods import add_method
from modules.adapters.methods.loftq import loftq
from modules.adapters.options import Options
from modules.adapters.parts import truncated_svd
from modules.quantization.nf4 import NF4Linear, dequantize_nf4, quantize_nf4, quantize_nf4_tensor
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import adamw, logits, train

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def test_error_falls(tmp_path):
    """Relative to NF4's own error, of a random 128 × 96 matrix, by rank and by iterations."""
    W = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    nf4 = (W - dequantize_nf4(quantize_nf4_tensor(W))).norm()
    error = {}
    for rank, iterations in [(4, 1), (16, 1), (64, 1), (16, 5)]:
        quantised, A, B = loftq(W, rank, NF4Linear, iterations)
        error[rank, iterations] = ((quantised.dense_weight() + B @ A - W).norm() / nf4).item()
    assert 1 > error[4, 1] > error[16, 1] > error[64, 1]
    assert error[16, 1] < 0.8 and error[16, 5] < error[16, 1]
    # of all matrices of that rank, the SVD's is the closest to what NF4 left over
    left = torch.linalg.svdvals(W - dequantize_nf4(quantize_nf4_tensor(W)))[16:].norm() / nf4
    assert error[16, 1] == pytest.approx(left.item(), rel=1e-4)


def test_model_is_closer_to_the_base_than_qlora(tmp_path):
    _, ours = make_pair(tmp_path)
    base, qlora = logits(ours), load(tmp_path)
    originals = {name: m.weight for name, m in ours.named_modules() if isinstance(m, torch.nn.Linear)}
    quantize_nf4(qlora)
    add_method(ours, "loftq", Options(rank=16, alpha=8.0, quantize=NF4Linear))
    for name, layer in lora_layers(ours).items():
        assert torch.equal(layer.weight.quantized_data, qlora.get_submodule(name).weight.quantized_data)
        _, A, B = loftq(originals[name], 16, NF4Linear)
        torch.testing.assert_close(layer.delta(), B @ A, rtol=1e-4, atol=1e-6)
    assert (logits(ours) - base).norm() < 0.8 * (logits(qlora) - base).norm()


def test_trains_and_opens_over_the_nf4_base(tmp_path):
    """Here over `quantize_nf4`; in peft over the dequantised weights, its float model of the same base."""
    reference, ours = make_pair(tmp_path / "base")
    add_method(ours, "loftq", Options(rank=4, alpha=8.0, targets=TARGETS, quantize=NF4Linear))
    quantize_nf4(ours)
    with torch.no_grad():
        for name, layer in ours.named_modules():
            if not (hasattr(layer, "dense_weight") and ".layers." in name):
                continue
            reference.get_submodule(name).weight.copy_(layer.dense_weight())
    save_adapter(tmp_path / "start", ours, base="base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "start", is_trainable=True)
    expected, got = train(theirs, adamw(theirs, 3e-3)), train(ours, adamw(ours, 3e-3))
    assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < 1e-4
    save_adapter(tmp_path / "ours", ours, base="base")
    theirs.save_pretrained(tmp_path / "theirs")
    opened, again = PeftModel.from_pretrained(reference, tmp_path / "ours"), load(tmp_path / "base")
    quantize_nf4(again)
    load_adapter(again, tmp_path / "theirs")
    assert (logits(opened) - logits(ours)).abs().max() < 1e-5
    assert (logits(again) - logits(theirs)).abs().max() < 1e-5


def test_what_it_needs_is_explained(tmp_path):
    reference, ours = make_pair(tmp_path / "base")
    with pytest.raises(ValueError, match="--quantize nf4"):
        add_method(ours, "loftq", Options())
    theirs = get_peft_model(reference, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs.peft_config["default"].init_lora_weights = "loftq"
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="quantise it first"):
        load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    quantize_nf4(ours)
    with pytest.raises(ValueError, match="before they are quantised"):
        add_method(ours, "loftq", Options(quantize=NF4Linear))


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (40, 40)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_the_largest_singular_triples(shape, rank):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vt = truncated_svd(W, rank)
    U_all, S_all, Vt_all = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(S, S_all[:rank], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((U * S) @ Vt, (U_all * S_all)[:, :rank] @ Vt_all[:rank], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(U.t() @ U, torch.eye(rank), rtol=1e-5, atol=1e-5)
    U, S, Vt = truncated_svd(torch.zeros(shape), rank)
    assert not S.any() and Vt.isfinite().all() and U.isfinite().all()
