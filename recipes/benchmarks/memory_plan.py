"""What runs on the CPU say that they will need, against the memory that their process took at most.

python recipes/benchmarks/memory_plan.py --model DIR --data gsm8k/train.jsonl --output plan_cpu.json
"""

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this fork's modules, whatever else is installed
import tyro

from recipes.benchmarks.real_size import run_recipe

RUNS = [  # unlike in what is trained, what is kept and how long the rows are
    "lora_finetune --batch-size 4 --seq-len 512",
    "lora_finetune --batch-size 1 --seq-len 256 --activations none",
    "lora_finetune --batch-size 8 --seq-len 256 --activations fast --fused",
    "lora_finetune --batch-size 1 --seq-len 768 --packing --quantize nf4",
    "full_finetune --batch-size 2 --seq-len 512",
    "full_finetune --batch-size 1 --seq-len 256 --activations fast --optimizer adamw-8bit --grad-accum 2",
]


@dataclass
class Config:
    model: Path
    """Checkpoint folder."""
    data: Path
    """GSM8K, or other rows with question and answer."""
    output: Path
    """JSON file for the results."""
    steps: int = 4
    """Optimizer steps of each run."""


def main(cfg: Config) -> None:
    rows = []
    for run in RUNS:
        recipe, *flags = run.split()
        flags += f"--prompt-field question --completion-field answer --device cpu --max-steps {cfg.steps}".split()
        with tempfile.TemporaryDirectory() as folder:
            files = ["--model", cfg.model, "--data", cfg.data, "--output", folder]
            metrics, said = run_recipe(recipe, Path(folder), [*files, *flags])
        size, unit, parts = re.search(r"memory: about ([\d.]+) (GiB|MiB) (\(.*\))", said).groups()
        stated, peak = float(size) / (1 if unit == "GiB" else 1024), metrics[-1]["peak_memory_gib"]
        rows.append({"run": run, "stated_gib": round(stated, 3), "peak_gib": round(peak, 3), "parts": parts})
        print(f"{stated:6.2f} GiB stated, {peak:6.2f} GiB taken ({stated / peak - 1:+.0%}): {run}", flush=True)
    result = {"command": sys.argv, "torch": version("torch"), "rows": rows}
    cfg.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
