"""The record of a run, run.json: what it says, and which settings of it a later start may change."""

import dataclasses
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from checkpointing.atomic import atomic_write_text
from checkpointing.errors import say

# Settings that a resumed run may change: they do not change what is computed, only for how long and what is observed.
LENGTH = ("max_steps", "epochs")
OBSERVATION = ("save_every", "keep_last", "eval_every", "eval_data", "tensorboard", "wandb")
# Memory options: a run that ran out of memory must be able to go on with less (equal up to rounding).
MEMORY = ("activations", "activations_every", "activations_gib", "weights", "embedding")
# Files may move: their fingerprints are compared.
MAY_CHANGE = ("output", "resume", "device", "model", "data", *LENGTH, *OBSERVATION, *MEMORY)
DIFF_BYTES = 1_000_000


def describe_run(config: dict, script: Path) -> dict:
    """What run.json records about a start; null is what cannot be found out."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    hardware = {
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "devices": [{"name": device.name, "memory_bytes": device.total_memory} for device in devices],
    }
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "torchao", "handtune"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    revision = _git(script.parent, "rev-parse", "--verify", "HEAD")
    diff = _git(script.parent, "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD") if revision else None
    return {
        "script": str(script),
        "command": shlex.join(sys.argv),
        "started": timestamp(),
        "finished": None,
        "results": [],
        "config": config,
        "versions": versions,
        "git": {"revision": revision and revision.strip(), "diff": diff},
        "hardware": hardware,
        "resumed": [],
    }


def keep_script(folder: Path, script: Path) -> None:
    """Copy the script that runs to recipe.py; the one of an earlier start is kept under another name."""
    recipe = folder / "recipe.py"
    if not script.is_file() or (recipe.exists() and os.path.samefile(recipe, script)):
        return
    text = script.read_text(encoding="utf-8")
    if recipe.exists() and recipe.read_text(encoding="utf-8") != text:
        earlier = folder / f"recipe-{1 + len(list(folder.glob('recipe-*.py')))}.py"
        os.rename(recipe, earlier)
        say(f"the script has changed since the earlier start, whose script is kept as {earlier}")
    atomic_write_text(recipe, text)


def compare_config(saved: Any, current: Any, may_change: Collection[str] = ()) -> dict[str, str]:
    """The settings that differ, as "saved -> current". ValueError for one not in MAY_CHANGE or `may_change`."""
    saved, current = to_json(saved), to_json(current)
    changes = {}
    for name in saved | current:
        there, here = saved.get(name, "(absent)"), current.get(name, "(absent)")
        if there != here:
            changes[name] = f"{there} -> {here}"
    if wrong := [f"{name}: {change}" for name, change in changes.items() if name not in (*MAY_CHANGE, *may_change)]:
        fix = "give the earlier values, or start anew in another --output"
        raise ValueError(f"--resume with other settings than the run began with: {'; '.join(wrong)}; {fix}")
    return changes


def to_json(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses become objects, tuples lists, tensors numbers, the rest text.

    NaN and infinities become "NaN", "Infinity" and "-Infinity", which Python's float() reads.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, torch.Tensor):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def timestamp() -> str:
    """The local time with its offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, at most `DIFF_BYTES` of it; None without git, outside of a repository, or after 20 s."""
    command = ["git", "-C", str(folder), *arguments]
    quiet = dict(stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryFile() as output:
        subprocess.run(command, stdout=output, timeout=20, check=True, **quiet)
        output.seek(0)
        text = output.read(DIFF_BYTES).decode("utf-8", errors="replace")
        return text + "\n[cut here]\n" if output.read(1) else text
    return None
