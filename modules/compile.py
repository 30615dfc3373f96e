"""`torch.compile` where it pays: for a model's block, once for all blocks, and for a few memory-bound functions."""

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

# bfloat16 between two operations is rounded where it would be without compilation: losses stay comparable.
ROUND_ALIKE = {"emulate_precision_casts": True}
_enabled = True


def enable_compile(on: bool) -> None:
    """--no-compile: the functions below run as they are written."""
    global _enabled
    _enabled = on


def runs_as_written(device: torch.device) -> bool:
    """Whether the functions below become no kernels on this device."""
    return device.type == "cpu" or not _enabled


def expect_few_kernels() -> None:
    """Before the compiler is imported: do without its pool of processes, which takes seconds to start and to end."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of the model in place; module names and state dict stay as they are."""
    # Every block adds entries to the same code object's cache; per-block differences must not exhaust the limit.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for block in model.blocks:
        block.compile(options=ROUND_ALIKE)


def compiled(function: Callable, *, any_length: bool = True) -> Callable:
    """Compile a function of tensors without autograd into a GPU kernel or two; on the CPU it runs as it is written.

    The first argument's first dimension, the number of tokens, is symbolic in all tensors that begin with it: another
    sequence length compiles nothing. The function goes to torch.compile's backend directly; torch.compile itself would
    cost the host 0.1 ms per call, as much as such a kernel may take.
    """
    kernels: dict[tuple, Callable] = {}
    seen: dict[tuple, Callable] = {}  # which of them serves arguments of exactly these shapes: found in 2 µs

    @functools.wraps(function)
    def call(*args):
        if not (_enabled and args[0].is_cuda) or torch.compiler.is_compiling():
            return function(*args)
        exactly = tuple([(a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a for a in args])
        kernel = seen.get(exactly)
        if kernel is None:
            tokens = args[0].shape[0] if any_length else -1
            # 0 and 1 tokens, and offsets of 2³¹ numbers, are where a kernel for all other lengths would be wrong.
            key = (tokens < 2, *((*_kind(a, tokens), _extent(a) < 2**31) if isinstance(a, Tensor) else a for a in args))
            if key not in kernels:
                kernels[key] = _build(function, args, tokens)
            if len(seen) > 4096:
                seen.clear()
            kernel = seen[exactly] = kernels[key]
        return kernel([a for a in args if isinstance(a, Tensor)])

    return call


def _kind(tensor: Tensor, tokens: int) -> tuple:
    return tensor.dtype, tensor.stride(), tensor.shape[tensor.shape[:1] == (tokens,) :]


def _extent(tensor: Tensor) -> int:
    """The span of a tensor's numbers in memory."""
    return max(tensor.numel(), tensor.shape[0] * tensor.stride(0) if tensor.ndim else 1)


def _build(function: Callable, args: tuple, tokens: int) -> Callable[[list[Tensor]], Tensor | tuple[Tensor, ...]]:
    """A kernel that takes the list of the tensors among `args`; the other arguments are constants in it.

    The function returns a tensor, a tuple of tensors, or None (the kernel's `()`).
    """
    constants = [None if isinstance(a, Tensor) else a for a in args]  # the kernel outlives the tensors
    is_tensor = [isinstance(a, Tensor) for a in args]

    def of_tensors(*tensors):
        waiting = iter(tensors)
        return function(*(next(waiting) if own else c for own, c in zip(is_tensor, constants, strict=True)))

    try:
        return _compile(of_tensors, [a for a in args if isinstance(a, Tensor)], tokens)
    except Exception as error:  # the compiler's inner entrance is not promised to stay as it is
        warnings.warn(f"{function.__name__} goes through torch.compile ({error!r:.200})", stacklevel=2)
        ordinary = torch.compile(of_tensors)
        return lambda tensors: ordinary(*tensors)


def _compile(function: Callable, tensors: list[Tensor], tokens: int) -> Callable[[list[Tensor]], Tensor | tuple]:
    """Compile by the compiler's inner entrance, which wants the graph without mutations and decomposed."""
    # Imports that take seconds: not before something is compiled.
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, decomposition
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    alone = False

    def fake(tensor: Tensor) -> Tensor:
        symbolic = tensor.shape[:1] == (tokens,)
        dims = [DimDynamic.DYNAMIC if symbolic and i == 0 else DimDynamic.STATIC for i in range(tensor.ndim)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))

    def as_tuple(*tensors):
        nonlocal alone
        result = function(*tensors)
        alone = isinstance(result, Tensor)
        return (result,) if alone else result or ()

    fakes = [fake(tensor) for tensor in tensors]
    functional = torch.func.functionalize(as_tuple, remove="mutations")
    with mode, torch.no_grad():
        graph = make_fx(functional, decomposition_table=decomposition.select_decomp_table())(*fakes)
    with tracing(TracingContext(mode)):  # without it the compiler does not look into its cache on the disk
        # Without is_inference trying out configurations clones what a kernel overwrites: 0.75 GiB in a 1B's step.
        kernel = compile_fx.compile_fx_inner(graph, fakes, is_inference=True)
    return (lambda tensors: kernel(tensors)[0]) if alone else kernel
