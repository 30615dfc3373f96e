"""What each kind of frozen weight costs and loses: bits per weight, and the error of rounding to it and back.

    python recipes/benchmarks/quantizers.py --output recipes/benchmarks/quantizers.json

On normally distributed numbers (one matrix, 4096 × 4096) and on the linear layers of a checkpoint's blocks. The error
is the root mean square of W - Q(W) as a part of that of W, all layers together. Prints the table of README.md here.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
import tyro
from torch import Tensor, nn

from checkpointing.pretrained import WeightFiles, find_checkpoint, map_weights, read_config
from checkpointing.run_record import describe_run
from models import build_model
from modules.memory.plan import storage_bytes
from modules.quantization.quantize import KINDS, linear_kind, stored_as
from recipes.benchmarks.figures import markdown


@dataclass
class Config:
    model: str = str(ROOT / "recipes/assets/quickstart_base")
    """Checkpoint whose blocks are rounded."""
    output: Path | None = None
    """JSON file to write."""
    size: int = 4096
    """Rows and columns of the random matrix."""
    device: str = "cpu"
    """Where to quantise."""


def main(cfg: Config) -> dict:
    folder = find_checkpoint(cfg.model)
    model = build_model(read_config(folder))
    map_weights(model, WeightFiles(folder))
    layers = [m.weight.detach() for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    normal = torch.randn(cfg.size, cfg.size, generator=torch.Generator().manual_seed(0))
    rows = {
        name: {"normal": measure([normal], name, cfg.device), "checkpoint": measure(layers, name, cfg.device)}
        for name in KINDS
    }
    record = describe_run({"model": Path(cfg.model).name, "size": cfg.size, "device": cfg.device}, Path(__file__))
    kept = {key: record[key] for key in ("started", "config", "versions", "hardware")}
    result = {"command": "python recipes/benchmarks/quantizers.py", **kept, "kinds": rows}
    head = ["`--quantize`", "bits per weight", "error, normal weights", f"error, {Path(cfg.model).name}"]
    table = []
    for name, row in rows.items():
        errors = [f"{100 * row[on]['error']:.2f} %" for on in ("normal", "checkpoint")]
        table.append([name, f"{row['normal']['bits']:.2f}", *errors])
    print(markdown(head, table))
    if cfg.output:
        cfg.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def measure(weights: Iterable[Tensor], name: str, device: str) -> dict[str, float]:
    """Bits per weight and relative error over all of these matrices."""
    stored = count = wrong = total = 0
    for weight in weights:
        layer, W = stored_as(linear_kind(name), weight.to(device)), weight.to(device).double()
        stored, count = stored + 8 * storage_bytes(layer.weight), count + weight.numel()
        wrong = wrong + (layer.dense_weight().double() - W).square().sum().item()
        total = total + W.square().sum().item()
    return {"bits": stored / count, "error": (wrong / total) ** 0.5}


if __name__ == "__main__":
    main(tyro.cli(Config))
