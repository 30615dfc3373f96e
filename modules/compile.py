"""`torch.compile` in the two sizes that pay: a model's block, and a handful of memory-bound functions.

The blocks of a model are alike, so one compilation serves all of them and takes seconds, not minutes.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

# bfloat16 between two operations is rounded where it would be without compilation: losses stay comparable.
ROUND_ALIKE = {"emulate_precision_casts": True}
_enabled = True


def enable_compile(on: bool) -> None:
    """--no-compile: the functions below run as they are written."""
    global _enabled
    _enabled = on


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of the model in place; module names and state dict stay as they are."""
    # Every block adds entries to the same code object's cache; per-block differences must not exhaust the limit.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for block in model.blocks:
        block.compile(options=ROUND_ALIKE)


def compiled(function: Callable, *, any_length: bool = True) -> Callable:
    """Make one GPU kernel (or two) of a function of tensors without autograd; on the CPU it runs as it is written.

    The first argument's first dimension, the number of tokens, is symbolic, here and wherever else it stands first:
    another sequence length compiles nothing anew. The function is handed to torch.compile's backend directly; going
    through torch.compile costs the host 0.1 ms per call, as much as such a kernel itself may take.
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
    """Numbers from a tensor's first to behind its last one, others between them included."""
    return max(tensor.numel(), tensor.shape[0] * tensor.stride(0) if tensor.ndim else 1)


def _build(function: Callable, args: tuple, tokens: int) -> Callable[[list[Tensor]], Tensor | tuple[Tensor, ...]]:
    """A kernel that takes the list of the tensors among `args`; the other arguments are constants in it.

    The function returns a tensor, a tuple of tensors, or None (the kernel's `()`).
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    constants = [None if isinstance(a, Tensor) else a for a in args]  # the kernel outlives the tensors
    is_tensor = [isinstance(a, Tensor) for a in args]
    alone = False

    def fake(tensor: Tensor) -> Tensor:
        symbolic = tensor.shape[:1] == (tokens,)
        dims = [DimDynamic.DYNAMIC if symbolic and i == 0 else DimDynamic.STATIC for i in range(tensor.ndim)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))

    def of_tensors(*tensors):
        waiting = iter(tensors)
        return function(*(next(waiting) if own else c for own, c in zip(is_tensor, constants, strict=True)))

    def as_tuple(*tensors):
        nonlocal alone
        result = of_tensors(*tensors)
        alone = isinstance(result, Tensor)
        return (result,) if alone else result or ()

    # The compiler's inner entrance. What torch.compile does around it for autograd makes a call half as long again.
    # It wants writes to the arguments gathered at the graph's end, and operations in the compiler's own words.
    try:
        from torch._inductor import compile_fx, decomposition  # takes seconds: not before something is compiled

        fakes = [fake(a) for a in args if isinstance(a, Tensor)]
        functional = torch.func.functionalize(as_tuple, remove="mutations")
        with mode, torch.no_grad():
            graph = make_fx(functional, decomposition_table=decomposition.select_decomp_table())(*fakes)
        # Without is_inference trying out configurations clones what a kernel overwrites: 0.75 GiB in a 1B's step.
        kernel = compile_fx.compile_fx_inner(graph, fakes, is_inference=True)
        return (lambda tensors: kernel(tensors)[0]) if alone else kernel
    except Exception as error:  # these entrances to the compiler are not promised to stay as they are
        warnings.warn(f"{function.__name__} goes through torch.compile ({error!r:.200})", stacklevel=2)
        whole = torch.compile(of_tensors)
        return lambda tensors: whole(*tensors)
