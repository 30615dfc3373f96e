"""Every parameter-efficient method on the same data with the same budget: a table, a picture, and JSON with all of it.

    python recipes/compare_methods.py
    python recipes/compare_methods.py --model BASE --data train.jsonl --eval-data test.jsonl --lr-scale 0.1

The first command takes the quickstart's task and base model (recipes/quickstart.py): a sentence becomes a line of JSON,
and an answer counts only if every character is right. The second takes data of yours; there the score is the loss on
--eval-data. `--preset llama-3.2-1b --tokenizer FOLDER` in place of --model makes a base of that shape with random
weights: speed and memory are a real one's, losses are not.

Each method of modules/adapters/methods/ is trained by recipes/peft_finetune.py (on the CPU in a process of its own):
200 steps of 16 rows, rank 16, 20 virtual tokens, one seed, plain modules without compilation: nothing but the method
differs. And its learning rate: no rate suits them all. Those below gave the best held-out loss on the quickstart's task
with --seed 1, whose rows are others, of at least three rates a factor of 3 apart (LOG.md has the figures). Other models
want other ones (--lr-scale), and a method that ends last here may end first with more steps or a larger base.
"""

import contextlib
import gc
import json
import multiprocessing
import re
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors, say  # isort: split

import torch
import tyro

from checkpointing.atomic import atomic_write_text, claim_folder
from modules.adapters.methods import METHODS, read_by
from modules.device import peak_memory_gib, pick_device
from recipes import peft_finetune, quickstart
from recipes.benchmarks.compare_report import draw, table
from recipes.benchmarks.real_size import write_checkpoint

# Settings of each method besides the common ones; a method that is not listed gets LoRA's.
SETTINGS: dict[str, dict] = {
    "lora": dict(lr=4e-3),
    "rslora": dict(lr=1.3e-3),
    "dora": dict(lr=4e-3),
    "lora-plus": dict(lr=3.3e-4),
    "lora-fa": dict(lr=1e-2),
    "pissa": dict(lr=1.3e-3),
    "olora": dict(lr=1.3e-3),
    "vera": dict(lr=1.2e-1),
    "loftq": dict(lr=4e-3, quantize="nf4"),  # it begins with the error of a quantised base, so it has one
    "eva": dict(lr=4e-3),
    "prompt": dict(lr=1e-1),
    "p-tuning": dict(lr=1.2e-2),
    "prefix": dict(lr=4e-1),
    "ia3": dict(lr=1.2e-1),
    "bitfit": dict(lr=1e-1),
    "ln": dict(lr=1.2e-1),
    "houlsby": dict(lr=1.2e-2),
    "pfeiffer": dict(lr=4e-2),
    "parallel": dict(lr=1.2e-2),
}


@dataclass
class Config:
    output: Path = Path("runs/compare_methods")
    """Folder for rows, runs, results.json and results.svg; an earlier comparison there is replaced."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods to compare."""
    model: str | None = None
    """Checkpoint folder or Hub id; default: the quickstart's base model and task."""
    preset: str | None = None
    """A shape of models/llama.py to make a base of, with random weights, in OUTPUT/base."""
    tokenizer: Path | None = None
    """With --preset: the folder with its tokenizer.model."""
    data: Path | None = None
    """Training rows, with --model or --preset."""
    eval_data: Path | None = None
    """Held-out rows; their loss is the score."""
    prompt_field: str | None = None
    """Column to use as the prompt, with --completion-field."""
    completion_field: str | None = None
    """Column to use as the completion, with --prompt-field."""
    train_rows: int = 800
    """Rows to learn from: so many of the quickstart's, or the first of --data."""
    held_out_rows: int = 200
    """Rows to test with."""
    max_steps: int = 200
    """Optimizer steps of each method."""
    batch_size: int = 16
    """Rows per step."""
    rank: int = 16
    """Of every method that has one."""
    num_virtual_tokens: int = 20
    """Of prompt, p-tuning and prefix."""
    lr_scale: float = 1.0
    """Multiplies every method's learning rate; a model of a billion weights wants about a tenth."""
    activations: Literal["none", "fast", "lean", "offload"] = "none"
    """What a block keeps for backward, as in the recipe; with none the methods differ most."""
    jobs: int = 2
    """On the CPU: methods at a time, with one thread each."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    seed: int = 0
    """Seed of the rows and of the training."""


SHOWN = ("trained", "exact_match", "eval_loss", "tokens_per_second", "peak_memory_gib", "whole_seconds")


def main(cfg: Config) -> None:
    started = time.perf_counter()
    if unknown := [name for name in cfg.methods if name not in METHODS]:
        raise ValueError(f"--methods {' '.join(unknown)}: not among {', '.join(METHODS)}")
    if not cfg.methods:
        raise ValueError("--methods: name one at least")
    device, base, rows = pick_device(cfg.device), prepare(cfg), {}
    run_all = in_processes if device.type == "cpu" else in_turn
    for row in run_all(cfg, base):
        rows[row["method"]] = row
        found = (f"{name.replace('_', ' ')} {row[name]:,.4g}" for name in SHOWN if name in row)
        say(f"{row['method']}: {row.get('failed') or ', '.join(found)}")
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python recipes/compare_methods.py", *changed(cfg)]),
            "machine": describe_machine(device),
            "seconds": round(time.perf_counter() - started, 1),
            "settings": {name: shown(value) for name, value in asdict(cfg).items()},
            "rows": [rows[name] for name in cfg.methods if name in rows],
        }
        atomic_write_text(cfg.output / "results.json", json.dumps(results, indent=1) + "\n")  # so far
    draw(results, cfg.output / "results.svg")
    print(table(results))
    say(f"{results['seconds']:.0f} s in all; {cfg.output}/results.json and results.svg")


def prepare(cfg: Config) -> str:
    """Write the rows, and with --preset the base; → the base's folder."""
    own = cfg.model or cfg.preset
    if cfg.model and cfg.preset:
        raise ValueError("--model and --preset: give one of them")
    if bool(own) != bool(cfg.data) or bool(own) != bool(cfg.eval_data):
        raise ValueError("--model or --preset, --data and --eval-data go together; without them: the quickstart's task")
    if bool(cfg.preset) != bool(cfg.tokenizer):
        raise ValueError("--preset and --tokenizer, the folder with that family's tokenizer.model, go together")
    train_file, held_out_file = cfg.output / "train.jsonl", cfg.output / "held_out.jsonl"
    claim_folder(cfg.output, "compare_methods.py", (*METHODS, "base"))
    if own:
        first_lines(cfg.data, cfg.train_rows, train_file)
        first_lines(cfg.eval_data, cfg.held_out_rows, held_out_file)
    else:
        rows = quickstart.make_rows(cfg.train_rows + cfg.held_out_rows, cfg.seed)
        quickstart.write_rows(held_out_file, rows[: cfg.held_out_rows])
        quickstart.write_rows(train_file, rows[cfg.held_out_rows :])
    if cfg.preset:
        write_checkpoint(cfg.output / "base", cfg.preset, cfg.tokenizer)
        return str(cfg.output / "base")
    return cfg.model or str(quickstart.BASE)


def first_lines(source: Path, count: int, target: Path) -> None:
    with open(source, encoding="utf-8") as lines:
        atomic_write_text(target, "".join(islice(lines, count)))


def in_processes(cfg: Config, base: str) -> Iterator[dict]:
    """A fresh process for each method, so that its peak of memory is its own.

    All begin as copies of one that has imported everything, which takes no time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.peft_finetune", "recipes.quickstart"])
    begin = dict(initializer=torch.set_num_threads, initargs=(1,), max_tasks_per_child=1)
    with ProcessPoolExecutor(cfg.jobs, mp_context=context, **begin) as pool:
        running = [pool.submit(run_method, cfg, name, base) for name in cfg.methods]
        try:
            yield from (done.result() for done in as_completed(running))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C ends all


def in_turn(cfg: Config, base: str) -> Iterator[dict]:
    """One after another in this process, which starts the GPU once; its memory counters are reset for each method."""
    for name in cfg.methods:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield run_method(cfg, name, base)


def run_method(cfg: Config, name: str, base: str) -> dict:
    """Train by one method with the recipe; → its row. The recipe prints to OUTPUT/METHOD.log."""
    settings = SETTINGS.get(name, SETTINGS["lora"])
    settings = settings | {"lr": settings["lr"] * cfg.lr_scale}
    row = {"method": name, "settings": settings}
    with open(cfg.output / f"{name}.log", "w", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        try:
            return row | train(cfg, name, base, settings)
        except Exception as error:  # the others go on
            traceback.print_exc()
            return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def train(cfg: Config, name: str, base: str, settings: dict) -> dict:
    device = pick_device(cfg.device)
    before = peak_memory_gib(device)  # on the CPU, that of Python and PyTorch themselves
    started, processor = time.perf_counter(), time.process_time()
    run = cfg.output / name
    sizes = {"rank": cfg.rank, "num_virtual_tokens": cfg.num_virtual_tokens}
    peft_finetune.main(
        peft_finetune.Config(
            model=base,
            data=cfg.output / "train.jsonl",
            eval_data=cfg.output / "held_out.jsonl",
            output=run,
            method=name,
            prompt_field=cfg.prompt_field,
            completion_field=cfg.completion_field,
            epochs=cfg.max_steps,  # enough: an epoch has a step at least
            max_steps=cfg.max_steps,
            batch_size=cfg.batch_size,
            warmup_steps=cfg.max_steps // 20,
            activations=cfg.activations,
            fused=False,
            compile=False,
            save_every=0,
            device=cfg.device,
            seed=cfg.seed,
            **{flag: size for flag, size in sizes.items() if flag in read_by(name)},
            **settings,
        )
    )
    whole, processor = time.perf_counter() - started, time.process_time() - processor
    found = read_rows(run / "metrics.jsonl")
    steps = [row for row in found if "loss" in row]
    steady = steps[len(steps) // 5 :]  # the first ones warm up
    (trained,) = re.findall(r"^training ([\d,]+) of", (cfg.output / f"{name}.log").read_text(encoding="utf-8"), re.M)
    row = {
        "trained": int(trained.replace(",", "")),
        "first_loss": round(steps[0]["loss"], 4),
        "last_loss": round(steps[-1]["loss"], 4),
        "eval_loss": round(next(row["eval_loss"] for row in found if "eval_loss" in row), 4),
        "tokens_per_second": round(sum(row["tokens"] for row in steady) / sum(row["seconds"] for row in steady)),
        "peak_memory_gib": round(steps[-1]["peak_memory_gib"] - before, 4),
        "seconds": round(sum(row["seconds"] for row in steps), 1),
        "whole_seconds": round(whole, 1),  # with the start, the evaluation and the saving
        "processor_seconds": round(processor, 1),  # of these, what the CPU computed: a busy machine changes it little
        "adapter_bytes": (run / "adapter" / "adapter_model.safetensors").stat().st_size,
    }
    if base == str(quickstart.BASE):
        rows, processor = read_rows(cfg.output / "held_out.jsonl"), time.process_time()
        examined = quickstart.examine(rows, run / "adapter", settings.get("quantize", "none"))
        row["exact_match"] = round(examined["right"] / len(rows), 4)
        row["examination_processor_seconds"] = round(time.process_time() - processor, 1)
    return row


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def changed(cfg: Config) -> list[str]:
    """The flags that are not the defaults, for the record; files by their names."""
    words = []
    for name, value in asdict(cfg).items():
        if value != getattr(Config, name) and name not in ("output", "jobs"):
            value = shown(value)
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def shown(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return value.name if isinstance(value, Path) else value


def describe_machine(device: torch.device) -> dict:
    machine = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device.type == "cuda":
        return machine | {"gpu": torch.cuda.get_device_properties(device).name}
    return machine | {"cpu cores": multiprocessing.cpu_count()}


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
