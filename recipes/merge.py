"""Merge an adapter into its base and write a Hugging Face folder.

    python recipes/merge.py --model BASE --adapter runs/lora/adapter --output merged
    python recipes/merge.py --model BASE --adapter runs/qlora/adapter --output merged --quantize nf4
    python recipes/merge.py --model BASE --output dequantised --quantize nf4

Every method that a plain weight can stand for: LoRA and its relatives, DoRA, VeRA, (IA)³, BitFit, LN-tuning. W + Δ is
formed in float32 and rounded once to the checkpoint's dtype, one layer at a time, the base memory-mapped: memory is
that of the largest tensor.

`--quantize nf4` (or int8, int4, float8) first rounds the blocks' linear layers and back: the base that a QLoRA adapter
was trained on. Without an adapter that writes the base as QLoRA sees it. With one it prints, as JSON, what quantising
the result again would do to each kind of layer: the error of that rounding as a part of the merged weight
(`of_weight`) and of the adapter's change (`of_change`; above 1, most of the adapter is lost: serve it unmerged).
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors, say  # isort: split

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from checkpointing.adapters import load_adapter
from checkpointing.atomic import atomic_folder, check_vacant
from checkpointing.export import changed, check_export, write_companions, write_weights
from checkpointing.pretrained import WeightFiles, find_checkpoint, map_weights, on_disk, read_config
from checkpointing.safetensors_file import spec_bytes
from data.tokenizers.new_tokens import copy_tokenizer, tokenizer_folder
from models import build_model
from modules.adapters.methods.bitfit import missing_biases
from modules.adapters.switch import Requantised, adapted_layers, check_mergeable, requantised
from modules.adapters.vocabulary import HEAD, embedding_name
from modules.device import DTYPES, pick_device
from modules.quantization.quantize import linear_kind, quantize_blocks, stored_as


@dataclass
class Config:
    model: str
    """Checkpoint folder or Hub id of the base."""
    output: Path
    """Folder to write; it must not exist or be empty."""
    adapter: Path | None = None
    """Adapter folder in PEFT's format."""
    quantize: Literal["none", "nf4", "int8", "int4", "float8"] = "none"
    """Round the blocks' linear layers like this first."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the written weights; auto: the checkpoint's."""
    device: str = "cpu"
    """Where to add and quantise: cpu, cuda …"""


@torch.no_grad()
def main(cfg: Config) -> None:
    if cfg.adapter is None and cfg.quantize == "none":
        raise ValueError("nothing to do: give --adapter, --quantize nf4 or both")
    check_vacant(cfg.output)
    device = pick_device(cfg.device)
    folder = find_checkpoint(cfg.model)
    config = read_config(folder)
    weights = WeightFiles(folder)
    model = build_model(config)
    kind = linear_kind(cfg.quantize)
    quantized = set(quantize_blocks(build_model(config), kind))  # their names
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    map_weights(model, weights)
    vocab_size, tied = model.config.vocab_size, model.config.tie_word_embeddings
    layers = {}
    if cfg.adapter:
        load_adapter(model, cfg.adapter)
        layers = adapted_layers(model)
        check_mergeable(layers)
    errors: dict[str, Requantised] = {}
    last: dict[str, nn.Module] = {}  # a layer is merged once for its weight and its bias

    def rounded(path: str, weight: Tensor) -> Tensor:
        weight = weight.to(device, weight.dtype if cfg.dtype == "auto" else DTYPES[cfg.dtype])
        return stored_as(kind, weight).dense_weight() if path in quantized else weight

    def merged(path: str) -> nn.Module:
        if path not in last:
            last.clear()
            layer, stored = layers[path], layers[path].weight
            layer.weight = nn.Parameter(rounded(path, stored), requires_grad=False)
            last[path] = layer.to(device).merged()
            if path in quantized:
                again = rounded(path, last[path].weight)
                errors[path] = requantised(layer.weight, last[path].weight, again)
            layer.weight = stored  # what was read of the file is dropped
        return last[path]

    def read(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        if path in layers:
            return getattr(merged(path), leaf)
        if name in new_biases:
            return torch.zeros(new_biases[name])
        tensor = model.get_parameter(name)
        return rounded(path, tensor) if leaf == "weight" else tensor

    new_biases, fields = missing_biases(model)
    config = changed(config, **fields)
    if tied and not is_still_tied(model, layers, merged):  # the head no longer equals the embedding: it stands alone
        config, tied = changed(config, tie_word_embeddings=False), False
    if model.config.vocab_size != vocab_size:
        config = changed(config, vocab_size=model.config.vocab_size)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dtype = next(iter(parameters.values())).dtype if cfg.dtype == "auto" else DTYPES[cfg.dtype]
    specs, ours = {}, {}
    for name in [*names, *new_biases]:
        if not (tied and name == f"{HEAD}.weight"):
            shape = new_biases.get(name) or tuple(parameters[name].shape)
            own = parameters[name].dtype if name in parameters and cfg.dtype == "auto" else dtype
            specs[name], ours[on_disk(name, model.names_read)] = (on_disk(name, model.names_read), shape, own), name

    def write(file: str) -> Tensor:
        bar.update()
        return read(ours[file]).to(specs[ours[file]][2])

    cfg.output.parent.mkdir(parents=True, exist_ok=True)
    check_export(cfg.output.parent, sum(spec_bytes(spec) for spec in specs.values()))
    with atomic_folder(cfg.output) as target, tqdm(total=len(specs), unit="tensor", disable=None) as bar:
        write_weights(target, specs.values(), write)
        template = cfg.adapter / "chat_template.jinja" if cfg.adapter else None
        chat_template = template.read_text(encoding="utf-8") if template and template.is_file() else None
        write_companions(target, config, folder, dtype=dtype, chat_template=chat_template)
        if (source := tokenizer_folder(folder, cfg.adapter)) != folder:  # the adapter brings new tokens
            copy_tokenizer(source, target)
    if errors:
        print(json.dumps({"requantised": summary(errors)}, indent=2))
    say(f"merged model in {cfg.output}")


def is_still_tied(model: nn.Module, layers: dict[str, nn.Module], merged) -> bool:
    embedding = embedding_name(model)
    if embedding not in layers and HEAD not in layers:
        return model.lm_head.weight is model.get_submodule(embedding).weight
    both = [merged(n).weight if n in layers else model.get_submodule(n).weight for n in (embedding, HEAD)]
    return torch.equal(both[0].to(both[1]), both[1])


def summary(errors: dict[str, Requantised]) -> dict[str, dict]:
    """Means over the layers of a kind, and the worst of them."""
    kinds = defaultdict(list)
    for path, error in errors.items():
        kinds[path.rpartition(".")[2]].append((error.of_weight, error.of_change, path))
    return {
        kind: {
            "layers": len(rows),
            "of_weight": sum(row[0] for row in rows) / len(rows),
            "of_change": sum(row[1] for row in rows) / len(rows),
            "worst_of_weight": max(rows)[0],
            "worst_layer": max(rows)[2],
        }
        for kind, rows in kinds.items()
    }


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
