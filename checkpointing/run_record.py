"""The record of a run, run.json: what it says, and which settings of it a later start may change."""

import dataclasses
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HOW_LONG = ("max_steps", "epochs")
# Settings that a resumed run may change: they say where, how long and how closely watched, not what is computed.
WATCHING = ("save_every", "keep_last", "eval_every", "eval_data", "tensorboard", "wandb")
# Where things are kept: a run that died of memory must be able to go on with less (equal up to rounding).
MEMORY = ("activations", "activations_every", "activations_gib", "weights", "embedding")
# The same files under another path are the same: their fingerprints are compared.
MAY_CHANGE = ("output", "resume", "device", "model", "data", *HOW_LONG, *WATCHING, *MEMORY)
DIFF_BYTES = 1_000_000


def describe_run(config: dict, script: Path) -> dict:
    """What run.json records about a start; what cannot be found out is null."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    hardware = {
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
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
        "config": config,
        "versions": versions,
        "git": {"revision": revision and revision.strip(), "diff": diff},
        "hardware": hardware,
        "resumed": [],
    }


def compare_config(saved: Any, current: Any) -> dict[str, str]:
    """The settings that differ, each with "saved -> current"; ValueError for those not among MAY_CHANGE."""
    saved, current = plain(saved), plain(current)
    changes = {}
    for name in saved | current:
        there, here = saved.get(name, "(absent)"), current.get(name, "(absent)")
        if there != here:
            changes[name] = f"{there} -> {here}"
    if wrong := [f"{name}: {change}" for name, change in changes.items() if name not in MAY_CHANGE]:
        fix = "give the earlier values, or start anew in another --output"
        raise ValueError(f"--resume with other settings than the run began with: {'; '.join(wrong)}; {fix}")
    return changes


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses become objects, tuples lists, scalar tensors numbers, the rest text.

    NaN and infinities, which JSON lacks, become "NaN", "Infinity" and "-Infinity"; Python's float() reads them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def timestamp() -> str:
    """The local time with its distance from UTC: read back on any machine, it is the same date."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


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
