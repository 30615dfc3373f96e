"""How PEFT names tensors and the modules that it adapts. Our module names are transformers' own: nothing is renamed."""

import re
from collections.abc import Iterable

PREFIX = "base_model.model."  # stands before a module's name in adapter_model.safetensors


def target_modules(adapted: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """What PEFT must be told to adapt exactly these modules: short names where they are unambiguous, else full ones."""
    adapted = set(adapted)
    short = sorted({name.rpartition(".")[2] for name in adapted})
    inside_adapter = tuple(f"{name}." for name in adapted)
    candidates = [name for name in all_modules if not name.startswith(inside_adapter)]
    hit = {n for n in candidates if any(n == s or n.endswith(f".{s}") for s in short)}
    return short if hit == adapted else sorted(adapted)


def look_up(patterns: dict | None, name: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: a key is a regular expression for a module's last components."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
