"""Merge a LoRA adapter into its base and write a Hugging Face folder.

    python recipes/merge.py --model BASE --adapter runs/lora/adapter --output merged
    python recipes/merge.py --model BASE --adapter runs/qlora/adapter --output merged --quantize nf4
    python recipes/merge.py --model BASE --output dequantised --quantize nf4

W + (α/r) · B A, formed in float32 and rounded once to the checkpoint's dtype, one tensor at a time: memory is that of
the largest tensor. `--quantize nf4` first rounds the blocks' linear layers to NF4 and back: the base that a QLoRA
adapter was trained on. Without an adapter that writes the base as QLoRA sees it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed

import tyro
from torch import Tensor
from tqdm import tqdm

from checkpointing.adapters import read_adapter
from checkpointing.atomic import atomic_folder
from checkpointing.errors import clear_errors, say
from checkpointing.export import check_export, write_companions, write_weights
from checkpointing.pretrained import WeightFiles, check_names, find_checkpoint, on_disk, read_config
from checkpointing.safetensors_file import spec_bytes
from models import build_model
from modules.device import DTYPES, pick_device
from modules.nf4 import dequantize_nf4, quantize_nf4, quantize_nf4_tensor


@dataclass
class Config:
    model: str
    """Checkpoint folder or Hub id of the base."""
    output: Path
    """Folder to write; it must not exist or be empty."""
    adapter: Path | None = None
    """LoRA adapter folder in PEFT's format."""
    quantize: Literal["none", "nf4"] = "none"
    """Round the blocks' linear layers to NF4 first."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the written weights; auto: the checkpoint's."""
    device: str = "cpu"
    """Where to add and quantise: cpu, cuda …"""


def main(cfg: Config) -> None:
    if cfg.adapter is None and cfg.quantize == "none":
        raise ValueError("nothing to do: give --adapter, --quantize nf4 or both")
    if cfg.output.exists() and (not cfg.output.is_dir() or any(cfg.output.iterdir())):
        raise ValueError(f"--output {cfg.output} exists already; choose another folder")
    device = pick_device(cfg.device)
    folder = find_checkpoint(cfg.model)
    config = read_config(folder)
    weights = WeightFiles(folder)
    model = build_model(config)  # for its names and shapes
    layout = check_names(model, weights)
    quantized = {f"{name}.weight" for name in quantize_nf4(model)} if cfg.quantize == "nf4" else set()
    settings, adapter = read_adapter(cfg.adapter) if cfg.adapter else ({}, {})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name in settings:
        delta_shape = (adapter[f"{name}.lora_B.weight"].shape[0], adapter[f"{name}.lora_A.weight"].shape[1])
        if shapes.get(f"{name}.weight") != delta_shape:
            raise ValueError(f"{cfg.adapter} does not fit {cfg.model}: {name} is {shapes.get(f'{name}.weight')}")

    files = {name: on_disk(name, layout) for name in shapes}  # what each is called there
    tied = model.config.tie_word_embeddings
    names = [name for name in shapes if files[name] in weights and not (tied and name == "lm_head.weight")]
    if tied and "lm_head" in settings:
        # The adapted head no longer equals the embedding: write it on its own.
        config = config | {"tie_word_embeddings": False}
        if "text_config" in config:
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
        names.append("lm_head.weight")
    (embedding,) = (file for name, file in files.items() if name.endswith("embed_tokens.weight"))

    def stored(name: str) -> Tensor:
        tensor = weights.read(files[name] if files[name] in weights else embedding)  # a tied head
        return tensor if cfg.dtype == "auto" else tensor.to(DTYPES[cfg.dtype])

    def merged(file: str) -> Tensor:
        bar.update()
        name = ours[file]
        tensor, module = stored(name).to(device), name.removesuffix(".weight")
        if name in quantized:
            tensor = dequantize_nf4(quantize_nf4_tensor(tensor))
        if module in settings:
            A, B = (adapter[f"{module}.lora_{x}.weight"].to(device).float() for x in "AB")
            scaling = settings[module]["alpha"] / settings[module]["rank"]
            tensor = (tensor.float() + (B @ A) * scaling).to(tensor.dtype)
        return tensor

    specs = [(files[name], shapes[name], stored(name).dtype) for name in names]
    ours = {files[name]: name for name in names}
    template = cfg.adapter / "chat_template.jinja" if cfg.adapter else None
    cfg.output.parent.mkdir(parents=True, exist_ok=True)
    check_export(cfg.output.parent, sum(spec_bytes(spec) for spec in specs))
    with atomic_folder(cfg.output) as target, tqdm(total=len(names), unit="tensor", disable=None) as bar:
        write_weights(target, specs, merged)
        chat_template = template.read_text(encoding="utf-8") if template and template.is_file() else None
        write_companions(target, config, folder, dtype=specs[0][2], chat_template=chat_template)
    say(f"merged model in {cfg.output}")


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
