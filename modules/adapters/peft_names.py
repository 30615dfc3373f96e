"""How PEFT names tensors and the modules that it adapts. Our module names are transformers' own: nothing is renamed."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

PREFIX = "base_model.model."  # stands before a module's name in adapter_model.safetensors


def target_modules(adapted: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """What PEFT must be told to adapt exactly these modules: short names where they are unambiguous, else full ones."""
    adapted = set(adapted)
    short = sorted({name.rpartition(".")[2] for name in adapted})
    inside_adapter = tuple(f"{name}." for name in adapted)
    candidates = [name for name in all_modules if not name.startswith(inside_adapter)]
    hit = {n for n in candidates if any(n == s or n.endswith(f".{s}") for s in short)}
    return short if hit == adapted else sorted(adapted)


def targets_of(configs: list[dict], settings: dict[str, dict]) -> list[str] | str:
    """What PEFT must be told to adapt these modules: what it was told, where that is one thing, or their full names."""
    told = [config.get("target_modules") for config in configs]
    narrowed = any(config.get(key) for config in configs for key in ("layers_to_transform", "exclude_modules"))
    same = all(isinstance(t, str | list) and sorted(t) == sorted(told[0]) for t in told)
    return told[0] if same and not narrowed else sorted(settings)


def look_up(patterns: dict | None, name: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: a key is a regular expression for a module's last components."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def shorten_pattern(sizes: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common of the layers' sizes (ranks, alphas), and a pattern for the others: short names where they do."""
    common = Counter(sizes.values()).most_common(1)[0][0]
    pattern = {}
    for name, size in sizes.items():
        short = name.rpartition(".")[2]
        alike = {sizes[other] for other in sizes if other.rpartition(".")[2] == short} == {size}
        if size != common:
            pattern[short if alike else name] = size
    return common, pattern


def read_pattern(flag: str, items: Sequence[str], kind: type = float) -> dict[str, float]:
    """`q_proj=8 down_proj=32` of a command line. Raises ValueError for an item that is not NAME=NUMBER."""
    pattern = {}
    for item in items:
        name, _, number = item.rpartition("=")
        try:
            pattern[name] = kind(number)
            re.compile(name)
        except (ValueError, re.error):
            pattern[name] = 0
        if not name or pattern[name] <= 0:
            raise ValueError(f"{flag} {item} is not NAME=NUMBER, such as q_proj=8, with a number above 0")
    return pattern
