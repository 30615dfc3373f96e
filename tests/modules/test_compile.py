"""Kernels made of functions: one serves every length; what they may not serve gets another."""

import gc
import shutil
import warnings
import weakref
from functools import partial

import pytest
import torch

from modules import compile, loss
from modules.fused import pointwise


def random(generator, *shape, columns=None):
    """Of more columns only the first, as where outputs stand side by side."""
    if columns:
        return random(generator, shape[0], columns)[:, : shape[1]]
    return torch.randn(*shape, generator=generator)


def arguments(tokens):
    """Of every function that is compiled: what it is called with, in the shapes of a block of 4 heads of 6."""
    make = partial(random, torch.Generator().manual_seed(tokens))
    tables = make(tokens, 6), make(tokens, 6)
    q, k = make(tokens, 4, 6), make(tokens, 2, 6)
    return {
        pointwise.rms_norm: (make(tokens, 24), make(24), 1e-5),
        pointwise.rms_norm_backward: (make(tokens, 24), make(tokens, 24), make(24), 1e-5, make(tokens, 24)),
        pointwise.split_and_rotate: (make(tokens, 48), *tables, 4, 2),
        pointwise.split_and_rotate_backward: (q, k, make(tokens, 2, 6), *tables),
        pointwise.swiglu: (make(tokens, 32, columns=64), make(tokens, 32, columns=64)),
        pointwise.swiglu_backward_: (*(make(tokens, 32, columns=64) for _ in range(2)), make(tokens, 32)),
        loss._softmax_: (make(tokens, 50), torch.arange(tokens)[:, None] % 50),
    }


@pytest.mark.slow(3)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the CPU's compiler needs C++")
@pytest.mark.parametrize("function", arguments(2), ids=lambda function: function.__name__)
def test_one_kernel_serves_every_length(function):
    plain = function.__wrapped__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # _build warns when it has to fall back to torch.compile
        kernel = compile._build(plain, arguments(8)[function], tokens=8)
    for tokens in (8, 48, 3, 1000):
        args, expected_args = arguments(tokens)[function], arguments(tokens)[function]
        got = kernel([a for a in args if isinstance(a, torch.Tensor)])
        expected = plain(*expected_args)
        # What it returns, and what it overwrites.
        torch.testing.assert_close(got, () if expected is None else expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(args, expected_args, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the CPU's compiler needs C++")
def test_kernels_are_found_on_the_disk_again(monkeypatch, tmp_path):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for found in (0, 1):
        counters.clear()
        compile._build(lambda x: x * 2, (torch.zeros(3, 2),), tokens=3)
        assert counters["inductor"]["fxgraph_cache_hit"] == found


def test_where_the_compiler_has_no_such_entrance(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", None)
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def overwrite(x, n):
        x.add_(n)

    for function in (overwrite, lambda x, n: x + n, lambda x, n: (x + n, x)):
        x = torch.zeros(3, 2)
        with pytest.warns(UserWarning, match="goes through torch.compile"):
            kernel = compile._build(function, (x, 1.0), tokens=3)
        expected, got = torch.zeros(5, 2), torch.zeros(5, 2)
        torch.testing.assert_close(kernel([got]), function(expected, 1.0))
        assert got.equal(expected)
        left = weakref.ref(x)
        del x
        gc.collect()
        assert left() is None  # the kernel does not hold what it was first called with


def test_which_calls_share_a_kernel(monkeypatch):
    built = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    def build(function, args, tokens):
        built.append(tokens)
        return lambda tensors: len(built)

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
