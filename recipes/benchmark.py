"""Measure this machine: its peak rates, how close to them fine-tuning comes, and how little memory it needs.

    python recipes/benchmark.py --output results.json
    python recipes/benchmark.py --output results.json --parts longest --fit-lengths --confirm-gib 24
    python recipes/benchmark.py --table results.json
    python recipes/benchmark.py --output dry.json --device cpu --tiny --steps 2

Models have real shapes and random weights made on the device: nothing is downloaded. Every measurement is saved with
its settings as soon as it is done, and measuring it again replaces it, so parts can be run one by one. At the end come
tables in markdown and memory.svg, memory against sequence length, next to the output file. The top of
recipes/benchmarks/measure.py says how tokens and memory are counted.
"""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors  # isort: split

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # read when CUDA starts; long sequences need memory without holes
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import json

import torch
import tyro

from modules.device import pick_device, pick_dtype
from recipes.benchmarks import peers, vlm
from recipes.benchmarks.card import attempt
from recipes.benchmarks.ceilings import MEASUREMENTS, Clock
from recipes.benchmarks.measure import Machine, Row, activation_modes, build_and_train, shared_model
from recipes.benchmarks.report import Results, fit_memory, in_short, report

Part = Literal["ceilings", "speed", "peers", "rungs", "longest", "small", "full", "vlm"]
COMPARED_STEPS = 20
TINIER = 64  # --tiny divides sequence lengths by this
# What is compared between tools: model, method, batch × length.
COLUMNS = (
    Row("llama-3.1-8b", 2, 2048),
    Row("llama-3.1-8b", 1, 8192),
    Row("llama-3.1-8b", 2, 2048, quantize="nf4"),
    Row("llama-3.1-8b", 1, 8192, quantize="nf4"),
    Row("llama-3.2-1b", 4, 2048),
)


@dataclass
class Config:
    output: Path = Path("benchmark.json")
    """Results; added to if it exists."""
    parts: tuple[Part, ...] = get_args(Part)
    """ceilings: what the hardware can do. speed: all activation checkpointing modes at five shapes. peers: other tools
    at these shapes. rungs: do all modes train alike? longest: memory against sequence length. small: 8B and 70B under
    small caps. full: every weight trained. vlm: LLaVA-1.5-7B, an image in each row."""
    only: tuple[str, ...] = ()
    """All but longest: only rows whose printed line contains one of these texts (2x2048, fast)."""
    steps: int = 13
    """Steps per measurement; the first three are not timed."""
    activations_gib: tuple[float, ...] = ()
    """speed, vlm: measure offload also with as many blocks kept as with fast as fit into this memory."""
    activations_host_gib: float = 0.0
    """speed, vlm: the same, and offload alone, also with this much host memory for what attention made."""
    embedding: Literal["resident", "host"] = "resident"
    """speed, vlm: where the input embedding lives (longest and small: always on the host)."""
    quantize_head: bool = False
    """speed, longest, small, vlm: with NF4 weights the head is in 4 bits, too."""
    cap_gib: tuple[float, ...] = (8, 12, 16, 24)
    """longest: card sizes for which to compute the longest sequence."""
    fit_lengths: tuple[int, ...] = (16384, 32768, 65536)
    """longest: sequence lengths to which a line is fitted; none: those in the file."""
    confirm_gib: tuple[float, ...] = ()
    """longest: caps under which to run one step at the length that the line gives."""
    confirm_length: tuple[int, ...] = ()
    """longest: lengths to run instead, one per --confirm-gib."""
    table: Path | None = None
    """Measure nothing; print this file's tables and draw memory.svg next to it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    tiny: bool = False
    """Dry run: two-layer models, short sequences."""


def main(cfg: Config) -> None:
    if cfg.table:
        report(json.loads(cfg.table.read_text(encoding="utf-8")), cfg.table)
        return
    if cfg.steps < 1:
        raise ValueError(f"--steps {cfg.steps} must be at least 1")
    if cfg.confirm_length and len(cfg.confirm_length) != len(cfg.confirm_gib):
        raise ValueError(f"--confirm-length has {len(cfg.confirm_length)} values, --confirm-gib {len(cfg.confirm_gib)}")
    device = pick_device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    machine = Machine(device, pick_dtype("auto", device), cfg.tiny)
    results = Results(cfg.output, describe(machine), shlex.join(["python", "recipes/benchmark.py", *sys.argv[1:]]))
    for part in cfg.parts:
        PARTS[part](cfg, machine, results)
    report(results.data, cfg.output)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def measure_ceilings(cfg: Config, machine: Machine, results: Results) -> None:
    for measurement in MEASUREMENTS:
        figures = attempt(machine.device, measurement, Clock(machine))
        if reason := figures.pop("failed", None):
            figures = {f"{measurement.__name__}_failed": reason}
        results.put("ceilings", figures)
        for name, value in figures.items():
            print(f"ceilings: {name} {value}", flush=True)


def measure_speed(cfg: Config, machine: Machine, results: Results) -> None:
    """Every checkpointing mode of the fused blocks; at 2,048 tokens also the plain modules, compiled."""
    for column in COLUMNS:
        if not machine.config(column.preset).get("tie_word_embeddings"):
            head = cfg.quantize_head and column.quantize == "nf4"
            column = replace(column, embedding=cfg.embedding, quantize_head=head)
        rows = activation_modes(column, cfg.activations_gib, cfg.activations_host_gib)
        if column.length == 2048:
            rows += [replace(column, activations=mode, fused=False) for mode in ("none", "fast", "lean")]
        for row in wanted(rows, cfg, machine):
            add(results, "speed", row, attempt(machine.device, build_and_train, row, machine, steps=cfg.steps))


def measure_peers(cfg: Config, machine: Machine, results: Results) -> None:
    """Each tool in a process of its own, where what it needs is installed."""
    for key, peer in peers.PEERS.items():
        columns = [row for row in COLUMNS if is_wanted(f"{row.column}, {peer.name}", cfg)]
        if columns and peer.needs_cuda and not machine.on_cuda:
            print(f"peers: {peer.name}: skipped, its kernels need CUDA", flush=True)
            continue
        ready = [row for row in columns if not peers.missing(peer, row)]
        if skipped := [row for row in columns if row not in ready]:
            without = ", ".join(peers.missing(peer, skipped[-1]))
            print(f"peers: {peer.name}: {len(skipped)} of {len(columns)} skipped, not installed: {without}", flush=True)
        for row, figures in peers.measure(key, shrink(ready, machine), machine, steps=cfg.steps):
            results.add("peers", peers.settings(peer, row), figures)
            print(f"peers: {row.column}, {peer.name}: {in_short(figures)}", flush=True)


def measure_modes(cfg: Config, machine: Machine, results: Results) -> None:
    """Steps on one batch from the same weights: every mode's losses against those of the plain modules."""
    reference = Row("llama-3.2-1b", 4, 2048, activations="none", fused=False, compile=False)
    rows = [reference]
    for fused in (True, False):
        modes = ("none", "fast", "lean", "offload")
        rows += [replace(reference, activations=mode, fused=fused, compile=True) for mode in modes]
    in_blocks = replace(reference, activations="offload", fused=True, compile=True)
    rows += [replace(in_blocks, activations_host_gib=16), replace(in_blocks, weights="stream")]
    if cfg.only:
        cfg = replace(cfg, only=(*cfg.only, reference.way))
    expected = None
    for row in wanted(rows, cfg, machine):
        figures = attempt(machine.device, build_and_train, row, machine, steps=COMPARED_STEPS, lr=2e-4)
        losses = figures.get("losses")
        if row.way == reference.way:
            expected = losses
        if expected and losses:
            deviations = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
            figures["max_relative_deviation"] = max(deviations)
        add(results, "rungs", row, figures)


def measure_longest(cfg: Config, machine: Machine, results: Results) -> None:
    """One full step, optimizer included, of 8B QLoRA with everything in host memory that can be."""
    common = dict(activations="offload", weights="stream", embedding="host", optimizer="adamw-host")
    row = Row("llama-3.1-8b", 1, 0, quantize="nf4", quantize_head=cfg.quantize_head, rank=32, **common)
    (row,) = shrink([row], machine)
    measure = shared_model(row, machine)
    for length in cfg.fit_lengths:
        fitted = replace(row, length=length // TINIER if machine.tiny else length)
        add(results, "longest", fitted, measure(fitted, steps=1, warm_up=True))
    fit = fit_memory(results.data, asdict(row), cfg.cap_gib + cfg.confirm_gib)
    results.put("longest_fit", fit)
    print(f"longest: {fit['fixed_gib']} GiB + {fit['kb_per_token']} KB per token, {fit['longest']}", flush=True)
    for i, cap in enumerate(cfg.confirm_gib):
        length = cfg.confirm_length[i] if cfg.confirm_length else fit["longest"][f"{cap:g}"]
        if not length:
            print(f"longest: nothing to confirm under {cap:g} GiB", flush=True)
            continue
        confirmed = replace(row, length=length, cap_gib=cap)
        add(results, "longest", confirmed, measure(confirmed, steps=1))


def measure_small(cfg: Config, machine: Machine, results: Results) -> None:
    """Models larger than the card: weights streamed under a cap, compared with resident ones without."""
    common = dict(quantize="nf4", quantize_head=cfg.quantize_head, embedding="host")
    common |= dict(activations="offload", optimizer="adamw-host")
    small = Row("llama-3.1-8b", 1, 2048, weights="stream", cap_gib=4, **common)
    for row in wanted([small], cfg, machine):
        add(results, "small", row, attempt(machine.device, build_and_train, row, machine, steps=cfg.steps))
    for weights in ("stream", "resident"):
        caps = (8, 12) if weights == "stream" else (None, None)
        rows = [
            Row("llama-3.3-70b", 1, length, weights=weights, cap_gib=cap, **common)
            for length, cap in zip((4096, 16384), caps, strict=True)
        ]
        if not (rows := wanted(rows, cfg, machine)):
            continue
        measure = shared_model(rows[0], machine)
        for row in rows:
            add(results, "small", row, measure(row, steps=3, untimed=1, warm_up=True))
        del measure  # before the next model is made


def measure_full(cfg: Config, machine: Machine, results: Results) -> None:
    common = dict(rank=0, fused=False, step_in_backward=True)
    rows = [
        Row("llama-3.1-8b", 1, 2048, activations="offload", optimizer="adamw-host", **common),
        Row("llama-3.1-8b", 1, 8192, activations="offload", optimizer="adamw-host", **common),
        Row("llama-3.2-1b", 1, 2048, activations="lean", optimizer="adamw-8bit", **common),
        Row("llama-3.2-1b", 4, 2048, activations="lean", optimizer="adamw-8bit", **common),
        Row("llama-3.2-1b", 4, 2048, activations="offload", optimizer="adamw-host", **common),
    ]
    for row in wanted(rows, cfg, machine):
        add(results, "full", row, attempt(machine.device, build_and_train, row, machine, steps=min(cfg.steps, 8)))


def measure_vlm(cfg: Config, machine: Machine, results: Results) -> None:
    """Speed and memory, the longest sequence, and whether the GPU waits for decoded images."""
    for settings, measurement in vlm.measurements(cfg, machine):
        name = settings["name"]
        if is_wanted(name, cfg):
            figures = attempt(machine.device, measurement)
            results.add("vlm", settings, figures)
            idle = f", GPU idle {figures['idle_share']:.1%}" if "idle_share" in figures else ""
            print(f"vlm: {name}: {in_short(figures)}{idle}", flush=True)


PARTS: dict[Part, Callable[[Config, Machine, Results], None]] = {
    "ceilings": measure_ceilings,
    "speed": measure_speed,
    "peers": measure_peers,
    "rungs": measure_modes,
    "longest": measure_longest,
    "small": measure_small,
    "full": measure_full,
    "vlm": measure_vlm,
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows and results


def wanted(rows, cfg: Config, machine: Machine) -> list[Row]:
    """The rows that --only leaves, as this machine runs them."""
    return shrink([row for row in dict.fromkeys(rows) if is_wanted(f"{row.column}, {row.way}", cfg)], machine)


def is_wanted(name: str, cfg: Config) -> bool:
    return not cfg.only or any(text.replace("×", "x") in name.replace("×", "x") for text in cfg.only)


def shrink(rows, machine: Machine) -> list[Row]:
    """On a CPU nothing is compiled; in a dry run sequences are short."""
    rows = [replace(row, compile=row.compile and machine.on_cuda) for row in rows]
    return [replace(row, length=max(8, row.length // TINIER)) for row in rows] if machine.tiny else rows


def add(results: Results, part: Part, row: Row, figures: dict) -> None:
    results.add(part, asdict(row), figures)
    print(f"{part}: {row.column}, {row.way}, {row.weights} weights: {in_short(figures)}", flush=True)


def describe(machine: Machine) -> dict:
    on_cuda = machine.on_cuda
    return {
        "device": torch.cuda.get_device_name(machine.device) if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        "memory_gib": round(torch.cuda.mem_get_info(machine.device)[1] / 2**30, 1) if on_cuda else None,
        "torch": torch.__version__,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "tiny": machine.tiny,
    }


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
