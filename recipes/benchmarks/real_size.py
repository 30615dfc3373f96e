"""Real sizes on one GPU: Llama-3.2-1B and Llama-3.1-8B shapes with random weights, the Llama-3 tokenizer, GSM8K.

    python recipes/benchmarks/real_size.py --tokenizer LLAMA3_FOLDER --data gsm8k/train.jsonl --output real_size.json

Writes the checkpoints (sharded bfloat16 safetensors) to a scratch folder, then runs the recipes as a user would, one
process each: 50 steps of LoRA and QLoRA at both sizes; the time and the anonymous host memory that loading 8B to NF4
takes; 20 steps in bfloat16, float16 and float32, LoRA and full. Everything measured goes into one JSON file.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from shutil import copyfile, rmtree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
import tyro

from checkpointing.export import write_companions, write_weights
from checkpointing.metrics import MetricsFile
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from models import build_model
from models.llama import PRESETS


@dataclass
class Config:
    tokenizer: Path
    """Folder with Llama 3's tokenizer.model."""
    data: Path
    """GSM8K's train.jsonl."""
    output: Path
    """JSON file to write."""
    scratch: Path | None = None
    """Folder for checkpoints and runs (30 GB); default: a temporary one."""


def main(cfg: Config) -> None:
    with tempfile.TemporaryDirectory(dir=cfg.scratch) as scratch:
        results = measure(cfg, Path(scratch))
    cfg.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(cfg: Config, scratch: Path) -> dict:
    gpu = torch.cuda.get_device_properties(0)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu.name,
        "torch": torch.__version__,
        "command": f"python recipes/benchmarks/real_size.py --tokenizer {cfg.tokenizer.name} --data {cfg.data.name}",
        "runs": [],
    }
    for preset in ("llama-3.2-1b", "llama-3.1-8b"):
        results[f"write {preset}"] = write_checkpoint(scratch / preset, preset, cfg.tokenizer)
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh_process:
        load = fresh_process.submit(measure_loading, scratch / "llama-3.1-8b").result()
    results["load llama-3.1-8b to NF4"] = load
    print(f"load 8B to NF4: {load}", flush=True)

    copyfile(cfg.data, scratch / "train.jsonl")
    common = ["--data", scratch / "train.jsonl", "--prompt-field", "question", "--completion-field", "answer"]
    packed = ["--packing", "--seq-len", 2048, "--train-on", "all", "--max-steps", 50, "--lr", 5e-4]
    for preset, batch in (("llama-3.2-1b", 4), ("llama-3.1-8b", 2)):
        for quantize in ("none", "nf4"):
            flags = [*common, *packed, "--batch-size", batch, "--quantize", quantize]
            results["runs"].append(train("lora_finetune", scratch, preset, flags))
    small = [*common, "--max-steps", 20, "--batch-size", 4, "--no-compile", "--no-shuffle"]
    for recipe, lr in (("lora_finetune", 1e-3), ("full_finetune", 1e-4)):
        for dtype in ("float32", "bfloat16", "float16"):
            flags = [*small, "--dtype", dtype, "--lr", lr]
            results["runs"].append(train(recipe, scratch, "llama-3.2-1b", flags))
    return results


def write_checkpoint(folder: Path, preset: str, tokenizer: Path) -> dict:
    """A random bfloat16 checkpoint of a preset's shape, in shards, with the real tokenizer."""
    started = time.perf_counter()
    folder.mkdir(parents=True)
    config = PRESETS[preset] | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    shapes = {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def read(name: str) -> torch.Tensor:
        weight = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
        return weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, 0.02)

    write_weights(folder, [(name, shape, torch.bfloat16) for name, shape in shapes.items()], read)
    write_companions(folder, config, folder, dtype=torch.bfloat16)
    copyfile(tokenizer / "tokenizer.model", folder / "tokenizer.model")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    shards = len(list(folder.glob("*.safetensors")))
    return {"bytes": size, "shards": shards, "seconds": round(time.perf_counter() - started, 1)}


def measure_loading(folder: Path) -> dict:
    """Seconds and peak anonymous host memory of loading a checkpoint to NF4 on the GPU."""
    from modules.quantization.nf4 import quantize_nf4

    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            status = Path("/proc/self/status").read_text()
            anonymous = int(status.split("RssAnon:")[1].split()[0]) * 1024
            peak[0] = max(peak[0], anonymous)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    model = build_model(read_config(folder))
    quantize_nf4(model)
    load_weights(model, WeightFiles(folder), device=torch.device("cuda"), dtype=torch.bfloat16)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    done.set()
    return {
        "seconds": round(seconds, 2),
        "peak_anonymous_host_gib": round(peak[0] / 2**30, 2),
        "gpu_gib": round(torch.cuda.memory_allocated() / 2**30, 2),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def train(recipe: str, scratch: Path, preset: str, flags: list) -> dict:
    """Run a recipe; what its metrics say from step 5 on."""
    output = scratch / "run"
    flags = ["--model", scratch / preset, "--output", output, *flags, "--save-every", 0]
    command = [f"recipes/{recipe}.py", *(str(flag).replace(str(scratch), "SCRATCH") for flag in flags)]
    started = time.perf_counter()
    try:
        rows, _ = run_recipe(recipe, output, flags)
    except RuntimeError as error:
        print(error, flush=True)
        return {"command": command, "error": str(error)}
    seconds, steady = time.perf_counter() - started, rows[4:]
    result = {
        "command": command,
        "losses": [round(row["loss"], 5) for row in rows],
        "tokens_per_second": round(sum(r["tokens"] for r in steady) / sum(r["seconds"] for r in steady)),
        "peak_memory_gib": round(rows[-1]["peak_memory_gib"], 2),
        "first_step_seconds": round(rows[0]["seconds"], 1),
        "whole_run_seconds": round(seconds, 1),
    }
    rmtree(output)
    print(json.dumps(result), flush=True)
    return result


def run_recipe(recipe: str, output: Path, flags: list) -> tuple[list[dict], str]:
    """Run a recipe in a process of its own; → the rows of its metrics, and what it said."""
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", *map(str, flags)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return MetricsFile(output / "metrics.jsonl").rows(), done.stderr


if __name__ == "__main__":
    main(tyro.cli(Config))
