"""What modules/fused/lora_block.py was written for: the source and the attributes of the modules that it stands for.

Someone who edits `Attention.forward`, gives a norm another attribute or hangs a hook on a layer must not train the old
block. So everything that a block's forward reaches is compared with what is recorded here: the code of each function
(comments, docstrings and annotations aside) by a hash, the names of each module's attributes, parameters and
sub-modules by a list. What is not recorded is unknown, and `unknown_part` names it.

If a change here is deliberate and lora_block.py computes the same, record it: the failure of
tests/modules/fused/test_blocks.py prints the table.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from torch import nn
from torch.nn.modules import module as torch_module

# Used by both, the plain modules and lora_block.py: an edit of these reaches both.
SHARED = {"attend", "_masked", "dequantize_nf4", "scaling"}

SOURCE = {
    "LlamaBlock.forward": "e4ff6cec17fe",
    "Attention.forward": "2f525ca2f358",
    "Attention.keys_and_values": "be1c173e4edf",
    "apply_rotary": "239e296a1420",
    "FeedForward.forward": "c7583447b909",
    "RMSNorm.forward": "05443bde75d5",
    "LoRALinear.forward": "5f041ecbef4c",
    "FrozenLinear.frozen": "db0b97b3e648",
    "NF4Linear.forward": "d350fb318c50",
    "_FrozenNF4Linear.backward": "44c2cc48d4c0",
    "_FrozenNF4Linear.forward": "414422e1b2b6",
    "QuantizedLinear.forward": "27cec0c174ab",
    "_FrozenLinear.backward": "7d8ae758538b",
    "_FrozenLinear.forward": "f2d775253136",
}

LINEAR = {"weight", "bias", "in_features", "out_features"}
ATTRIBUTES = {
    "LlamaBlock": {"index", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "Attention": {"head_dim", "q_proj", "k_proj", "v_proj", "o_proj"},
    "FeedForward": {"activation", "gate_proj", "up_proj", "down_proj"},
    "RMSNorm": {"weight", "eps"},
    "Linear": LINEAR,
    "NF4Linear": LINEAR,
    "Int8Linear": LINEAR,
    "Int4Linear": LINEAR,
    "Float8Linear": LINEAR,
    "LoRALinear": LINEAR | {"base_class", "rank", "alpha", "lora_A", "lora_B", "dropout", "start_A", "start_B"},
    "Dropout": {"p", "inplace"},
}
OF_TORCH = {*vars(nn.Module()), "_compiled_call_impl"}
MISSING, UNKNOWN = object(), "unknown"
# Ways into a module other than its `forward`.
OWN_BY_TORCH = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def unknown_part(block: nn.Module) -> str | None:
    """The first thing in a block that is not recorded here; None if all of it is."""
    if any(getattr(torch_module, f"_global{name}", None) for name in HOOKS):
        return "a global hook is registered"
    for name, module in block.named_modules():
        where, kinds = name or type(module).__name__, [type(module)]
        if hasattr(module, "base_class"):
            kinds.append(module.base_class)
        for kind in kinds:
            if known_as(kind) is None:
                return f"{where} is a {kind.__name__}, which modules/fused/lora_block.py does not know"
            if reason := unknown_source(kind):
                return f"{where}: {reason}"
        has = {*vars(module), *module._parameters, *module._buffers, *module._modules} - OF_TORCH
        if unknown := has - ATTRIBUTES[known_as(kinds[0])]:
            return f"{where} has `{min(unknown)}`, which modules/fused/lora_block.py does not know"
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{where} has a hook"
    return None


def known_as(kind: type) -> str | None:
    """The class in the table whose `forward` this one has: its own, or one that it inherits from unchanged."""
    same = (c.__name__ for c in kind.__mro__ if getattr(c, "forward", None) is kind.forward)
    return next((name for name in same if name in ATTRIBUTES), None)


def unknown_source(kind: type) -> str | None:
    """How what this class computes with differs from what is recorded; None if it does not."""
    for name in OWN_BY_TORCH:
        if inspect.getattr_static(kind, name) is not inspect.getattr_static(nn.Module, name):
            return f"{kind.__name__}.{name} is not nn.Module's"
    for name, digest in source_of(kind).items():
        if SOURCE.get(name) != digest:
            return f"{name} is not the one that modules/fused/lora_block.py computes"
    return None


def source_of(kind: type) -> dict[str, str]:
    """By name, a hash of every function of ours that `forward` of this class reaches and of what it names."""
    found: dict[str, str] = {}
    waiting: list[tuple[type | None, object]] = [(kind, inspect.getattr_static(kind, "forward"))]
    while waiting:
        owner, value = waiting.pop()
        if isinstance(value, type):  # an autograd function
            waiting += [(value, inspect.getattr_static(value, name)) for name in ("forward", "backward")]
            continue
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if not isinstance(function, FunctionType):  # a partial, say, or an object that can be called
            found[f"{kind.__name__}'s {value!r}"] = UNKNOWN
            continue
        if function.__qualname__ in found or _is_foreign(function):
            continue
        named = []
        for name in sorted(set(_names(function.__code__)) - SHARED):
            used = function.__globals__.get(name, MISSING)
            if used is MISSING and owner is not None:  # perhaps a method
                used = inspect.getattr_static(owner, name, MISSING)
                if isinstance(used, FunctionType | property | staticmethod | classmethod) and not _is_foreign(used):
                    waiting.append((owner, used))
                    continue
            elif isinstance(used, type | FunctionType) and not _is_foreign(used):
                waiting.append((None, used))
                continue
            named.append(f"{name} = {_describe(used)}")
        found[function.__qualname__] = _digest(_source(function.__code__), *map(repr, _bound(function)), *named)
    return found


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function's code, and in that of functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _bound(function: FunctionType) -> tuple:
    """What a function brings along besides its code and its globals: defaults, and variables of a function around."""
    return function.__defaults__, function.__kwdefaults__, function.__closure__


def _is_foreign(thing: object) -> bool:
    function = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
    # A function's globals tell where it was written; a wrapper takes over the name of what it wraps.
    home = function.__globals__["__name__"] if isinstance(function, FunctionType) else function.__module__
    return home.partition(".")[0] in ("torch", "torchao", "builtins")


def _describe(thing: object) -> str:
    """A module, a function or a class by its name; a constant by its value."""
    if thing is MISSING:
        return "an attribute"
    if isinstance(thing, ModuleType):
        return thing.__name__
    if isinstance(thing, type | FunctionType | BuiltinFunctionType):
        return f"{thing.__module__}.{thing.__qualname__}"
    return repr(thing)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@lru_cache(maxsize=256)
def _source(code: CodeType) -> str:
    """A function's source without comments, docstring and annotations."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return UNKNOWN
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(tree)
