"""Kernels made of functions: one serves every length; what they may not serve gets another."""

import shutil
import warnings

import pytest
import torch

from modules import compile, pointwise


def arguments(tokens, dim=48):
    generator = torch.Generator().manual_seed(tokens)
    dy, x, onto = (torch.randn(tokens, dim, generator=generator) for _ in range(3))
    return dy, x, torch.randn(dim, generator=generator), 1e-5, onto


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the CPU's compiler needs C++")
def test_one_kernel_serves_every_length():
    function = pointwise.rms_norm_backward.__wrapped__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # _build warns when it has to fall back to torch.compile
        kernel = compile._build(function, arguments(8), tokens=8)
    for tokens in (8, 48, 3, 1000):
        args = arguments(tokens)
        got = kernel(*[a for a in args if isinstance(a, torch.Tensor)])
        torch.testing.assert_close(got, function(*args), rtol=1e-5, atol=1e-5)


def test_which_calls_share_a_kernel(monkeypatch):
    built = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    def build(function, args, tokens):
        built.append(tokens)
        return lambda *tensors: len(built)

    monkeypatch.setattr(compile, "_build", build)
    monkeypatch.setattr(compile, "_enabled", True)
    call = compile.compiled(lambda x, w, n: x)
    fixed = compile.compiled(lambda x, w, n: x, any_length=False)

    def gpu(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)

    assert call(gpu(5, 4), gpu(4), 1) == 1
    assert call(gpu(9, 4), gpu(4), 1) == 1  # another length
    assert call(gpu(5, 6), gpu(6), 1) == 2  # another width
    assert call(gpu(5, 4), gpu(4), 2) == 3  # another constant
    assert call(gpu(5, 4, dtype=torch.bfloat16), gpu(4), 1) == 4
    assert call(gpu(5, 8)[:, :4], gpu(4), 1) == 5  # strided
    assert call(gpu(1, 4), gpu(4), 1) == 6  # one token: a size that kernels for "any" length assume away
    assert call(gpu(9, 4), gpu(4), 1) == 6 and len(built) == 6
    assert fixed(gpu(5, 4), gpu(4), 1) == 7 and fixed(gpu(9, 4), gpu(4), 1) == 8
    compile.enable_compile(False)
    assert call(gpu(9, 4), gpu(4), 1).shape == (9, 4)
