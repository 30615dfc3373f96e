"""NF4 against torchao's own conversion, and the frozen linear layer over it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from modules.memory.plan import storage_bytes
from modules.quantization.nf4 import NF4Linear, NF4Tensor, dequantize_nf4, quantize_nf4_tensor
from tests.tiny import ROOT


@pytest.mark.parametrize("shape", [(256, 512), (128, 128), (64, 1024)])
def test_float32_equals_torchao_bit_for_bit(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    scale_block = min(256, shape[0] * shape[1] // 64)
    theirs, ours = NF4Tensor.from_tensor(weight, 64, scale_block), quantize_nf4_tensor(weight)
    for name in ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    assert torch.equal(dequantize_nf4(ours), theirs.get_original_weight())


def test_error_and_size_on_normal_weights():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    quantised = quantize_nf4_tensor(weight)
    rmse = (dequantize_nf4(quantised) - weight).square().mean().sqrt().item()
    assert rmse == pytest.approx(0.092, abs=0.001)  # bitsandbytes: 0.0920
    assert storage_bytes(quantised) * 8 / weight.numel() == pytest.approx(4.127, abs=0.002)


@pytest.mark.parametrize("shape", [(20, 20), (24, 40), (6, 7), (3, 128)])
def test_sizes_that_are_no_multiple_of_64(shape):
    weight = torch.randn(shape)
    assert (dequantize_nf4(quantize_nf4_tensor(weight)) - weight).abs().max() < 0.5
    with pytest.raises(ValueError, match="odd"):
        quantize_nf4_tensor(torch.randn(3, 5))


def test_zero_blocks_stay_zero_and_nan_is_an_error():
    weight = torch.randn(64, 128)
    weight[3] = 0
    assert not dequantize_nf4(quantize_nf4_tensor(weight))[3].any()
    assert not dequantize_nf4(quantize_nf4_tensor(torch.zeros(64, 64))).any()
    weight[5, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_nf4_tensor(weight)


def test_chunks_change_nothing(monkeypatch):
    weight = torch.randn(256, 256)
    whole = quantize_nf4_tensor(weight)
    monkeypatch.setattr("modules.quantization.nf4.CHUNK", 1000)
    assert torch.equal(quantize_nf4_tensor(weight).quantized_data, whole.quantized_data)


def test_gradcheck():
    layer = NF4Linear.from_linear(nn.Linear(16, 8, dtype=torch.float64))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.slow(2)
def test_a_missing_or_moved_torchao_is_named():
    hide = "import sys; sys.modules['torchao'] = None; import modules.quantization.nf4"
    done = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True)
    assert "need torchao 0.17 or 0.18, found torchao" in done.stderr.splitlines()[-1]


def test_bfloat16_weights_round_once():
    weight = torch.randn(64, 64).bfloat16()
    quantised = quantize_nf4_tensor(weight)
    assert quantised.dtype == torch.bfloat16 and dequantize_nf4(quantised).dtype == torch.bfloat16
    assert torch.equal(dequantize_nf4(quantised), dequantize_nf4(quantised, torch.float32).bfloat16())
