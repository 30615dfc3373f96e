"""Look at adapters, combine them, convert them to plain LoRA, merge them.

    python recipes/adapters.py inspect runs/lora/adapter
    python recipes/adapters.py combine --adapters sql/adapter chat/adapter --weights 0.7 0.3 --output both
    python recipes/adapters.py combine --adapters a b --weights 1 1 --combination ties_svd --density 0.2 --output c
    python recipes/adapters.py convert --adapter runs/dora/adapter --model BASE --rank 32 --output as-lora
    python recipes/adapters.py convert --adapter runs/lora/adapter --dtype bfloat16 --output small
    python recipes/adapters.py merge --model BASE --adapter runs/lora/adapter --output merged

Folders are in PEFT's format, both ways. Standard output carries one JSON object. What `combine` computes is
explained in lora_combine.py, what `convert` computes in lora_convert.py. Where a plain LoRA is only an approximation,
its error is reported. `merge` is recipes/merge.py.
"""

import json
import math
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors, say  # isort: split

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from checkpointing.adapters import load_adapter, read_adapter, read_folder, write_adapter
from checkpointing.atomic import atomic_folder, check_vacant
from checkpointing.pretrained import COMPANIONS, WeightFiles, find_checkpoint, map_weights, read_config
from models import build_model
from modules.adapters.lora_combine import COMBINATIONS, combine
from modules.adapters.lora_peft import config_of, factor_names, read_layers
from modules.adapters.methods import method_of
from modules.adapters.methods.lora_convert import change_of, fit
from modules.adapters.peft_names import PREFIX, targets_of
from modules.adapters.switch import adapted_layers
from modules.device import DTYPES, pick_device
from recipes import merge

LORA = ("lora_A", "lora_B")
BESIDE = ("modules_to_save", "trainable_token_indices")  # what peft allows besides them


@dataclass
class Inspect:
    """What a folder holds: method, base, and for each kind of module ranks, parameters and norms."""

    adapter: tyro.conf.Positional[Path]
    """Adapter folder in PEFT's format."""


@dataclass
class Combine:
    """One LoRA from several."""

    adapters: tuple[Path, ...]
    """LoRA folders of one base."""
    weights: tuple[float, ...]
    """One number each; negative ones take away."""
    output: Path
    """Folder to write; it must not exist or be empty."""
    combination: Literal[COMBINATIONS] = "cat"
    """How; cat is the weighted sum itself, svd the closest to it of a given rank."""
    rank: int | None = None
    """Of the result, for svd and the *_svd combinations; default: the largest of the adapters'."""
    density: float | None = None
    """The share of entries that ties, dare and magnitude_prune keep."""
    majority: Literal["total", "frequency"] = "total"
    """How ties elects a sign: by the sum of the entries, or by their number."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written tensors."""
    seed: int = 0
    """Of dare's random drops."""


@dataclass
class Convert:
    """A plain LoRA, α/r, from another method; another rank or precision."""

    adapter: Path
    """Adapter folder in PEFT's format."""
    output: Path
    """Folder to write; it must not exist or be empty."""
    model: str | None = None
    """The base, where the change depends on it: DoRA, (IA)³, VeRA, PiSSA and OLoRA as peft saves them."""
    rank: int | None = None
    """Of the result; default: what is exact, of DoRA the adapter's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the written tensors; auto: the adapter's."""
    device: str = "cpu"
    """Where to decompose matrices: an SVD of every adapted layer of a large model takes a GPU."""


Config = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Combine, tyro.conf.subcommand("combine")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[merge.Config, tyro.conf.subcommand("merge", description="Put an adapter into its base's weights.")]
)


@torch.no_grad()
def main(cfg: Inspect | Combine | Convert | merge.Config) -> None:
    if isinstance(cfg, merge.Config):
        return merge.main(cfg)
    report = {Inspect: inspect_folder, Combine: combine_folders, Convert: convert_folder}[type(cfg)](cfg)
    print(json.dumps(report, indent=2))


# ---------------------------------------------------------------------------------------------------------------------
# Inspect


def inspect_folder(cfg: Inspect) -> dict:
    config, tensors = read_folder(cfg.adapter)
    kinds = defaultdict(lambda: defaultdict(dict))  # kind of module → module → its tensors
    for key, tensor in tensors.items():
        module, part = split(key.removeprefix(PREFIX))
        kinds[module.rpartition(".")[2]][module][part] = tensor
    method = method_of(config)
    return {
        "adapter": str(cfg.adapter),
        "method": method,
        "peft_type": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "modules": {kind: describe_kind(config, modules) for kind, modules in kinds.items()},
    }


def split(key: str) -> tuple[str, str]:
    """A tensor's module, and its name there: everything from the method's prefix on."""
    for word in (".lora_", ".vera_", ".ia3_", ".ln_tuning_layers", ".adapter.", ".token_adapter."):
        if word in key:
            module, _, rest = key.partition(word)
            return module, (word + rest)[1:].removesuffix(".weight")
    return key.rpartition(".")[0] or key, key.rpartition(".")[2]


def describe_kind(config: dict, modules: dict[str, dict[str, Tensor]]) -> dict:
    """Frobenius norms are means over the modules; that of a LoRA's Δ = (α/r) B A is what it adds to the weight."""
    norms = defaultdict(list)
    for parts in modules.values():
        for part, tensor in parts.items():
            norms[part].append(tensor.float().norm().item())
    tensors = [tensor for parts in modules.values() for tensor in parts.values()]
    described = {"modules": len(modules), "parameters": sum(t.numel() for t in tensors)}
    lora = {f"{PREFIX}{m}.{p}.weight": t for m, parts in modules.items() for p, t in parts.items() if p in LORA}
    if lora and config.get("lora_alpha") and not config.get("lora_bias"):
        settings, _ = read_layers(plain(config), lora)
        described["rank"] = sorted({setting["rank"] for setting in settings.values()})
        described["alpha"] = sorted({setting["alpha"] for setting in settings.values()})  # as α/r: rsLoRA's times √r
        if config.get("use_dora"):  # whose change is more than B A
            settings = {}
        for m, s in settings.items():
            A, B = (modules[m][part].float() for part in LORA)
            # ‖B A‖² = Σ (A Aᵀ) ⊙ (Bᵀ B), as small as the rank
            norms["delta"].append((A @ A.t() * (B.t() @ B)).sum().clamp(min=0).sqrt().item() * s["alpha"] / s["rank"])
    return described | {"norms": {part: sum(values) / len(values) for part, values in norms.items()}}


def plain(config: dict) -> dict:
    """The config as that of a plain LoRA."""
    return config | {"use_dora": False, "init_lora_weights": True, **dict.fromkeys(BESIDE)}


# ---------------------------------------------------------------------------------------------------------------------
# Combine


def combine_folders(cfg: Combine) -> dict:
    check_vacant(cfg.output)
    if len(cfg.adapters) != len(cfg.weights):
        raise ValueError(f"--weights has {len(cfg.weights)} numbers for {len(cfg.adapters)} --adapters")
    if not all(map(math.isfinite, cfg.weights)):
        raise ValueError(f"--weights {' '.join(map(str, cfg.weights))} must be finite numbers")
    configs = [read_folder(folder)[0] for folder in cfg.adapters]
    for folder, config in zip(cfg.adapters, configs, strict=True):
        if (method := method_of(config)) not in ("lora", "rslora"):
            raise ValueError(f"{folder} is {method}: convert it to a plain LoRA first (adapters.py convert)")
    options = dict(rank=cfg.rank, density=cfg.density, majority=cfg.majority)
    generator = torch.Generator().manual_seed(cfg.seed)
    adapters = [read_adapter(folder) for folder in cfg.adapters]
    settings, tensors = combine(adapters, cfg.weights, cfg.combination, **options, generator=generator)
    bases = [config.get("base_model_name_or_path") for config in configs]
    if len(set(bases)) > 1:
        say(f"the adapters name different bases, {', '.join(map(str, bases))}: the result is for the first")
    config = config_of(settings, targets_of(configs, settings))
    write(cfg.output, cfg.adapters[0], bases[0], config, by_peft_name(tensors, DTYPES[cfg.dtype]))
    return {"combination": cfg.combination, "weights": cfg.weights} | sizes(settings)


# ---------------------------------------------------------------------------------------------------------------------
# Convert


def convert_folder(cfg: Convert) -> dict:
    check_vacant(cfg.output)
    if cfg.rank is not None and cfg.rank < 1:
        raise ValueError(f"--rank {cfg.rank} must be at least 1")
    config, tensors = read_folder(cfg.adapter)
    method, device = method_of(config), pick_device(cfg.device)
    others = {key: t for key, t in tensors.items() if not any(word in key for word in (".lora_", "vera_", ".ia3_"))}
    settings, new, layers, errors = {}, {}, {}, defaultdict(list)  # errors: by kind of module
    if method in ("lora", "rslora", "loftq"):
        settings, new = read_layers(plain(config), {key: t for key, t in tensors.items() if key not in others})
        if method == "loftq":
            say("LoftQ: the result belongs to the quantised base, as the adapter did")
    else:
        layers = adapted_by(cfg, method)
    for name in tqdm(settings or layers, unit="layer", disable=None):
        keys = factor_names(name, new)
        if layers:
            change, scale = change_of(layers[name].to(device)), 1.0
            layers[name].to("meta")  # one at a time
        else:
            change = tuple(new[key].to(device) for key in keys)
            scale = settings[name]["alpha"] / settings[name]["rank"]
        full = isinstance(change, Tensor)
        if (rank := cfg.rank or (config.get("r") if full else len(change[0]))) is None:
            raise ValueError(f"the change of {method} has full rank: say which --rank is to stand for it, 32 perhaps")
        if cut := full or rank < len(change[0]):
            *change, lost, total = fit(change, rank)
            errors[name.rpartition(".")[2]].append((lost * scale, total * scale))
        if cut or name not in settings:
            settings[name] = {"rank": len(change[0]), "alpha": scale * len(change[0])}
        new |= zip(keys, (factor.cpu() for factor in change), strict=True)
    dtype = next(iter(tensors.values())).dtype if cfg.dtype == "auto" else DTYPES[cfg.dtype]
    fields = {key: config[key] for key in BESIDE if config.get(key)}
    new_config = config_of(settings, targets_of([config], settings)) | fields
    base = config.get("base_model_name_or_path")
    write(cfg.output, cfg.adapter, base, new_config, by_peft_name(new, dtype) | others)
    report = {"method": method, "to": "lora", "exact": not errors} | sizes(settings)
    if errors:
        report["relative_error"] = relative(chain(*errors.values()))
        report["relative_error_of"] = {kind: relative(pairs) for kind, pairs in errors.items()}
    return report


def adapted_by(cfg: Convert, method: str) -> dict[str, nn.Module]:
    """The layers of the base with the adapter in them; their weights are read when they are used."""
    if method not in ("dora", "ia3", "vera", "pissa", "olora"):
        raise ValueError(f"--adapter {cfg.adapter} is {method}: no LoRA does what it computes")
    if cfg.model is None:
        raise ValueError(f"--adapter {cfg.adapter} is {method}, whose change depends on the base: give --model")
    folder = find_checkpoint(cfg.model)
    model = build_model(read_config(folder))
    map_weights(model, WeightFiles(folder))
    load_adapter(model, cfg.adapter)
    return {name: layer for name, layer in adapted_layers(model).items() if not hasattr(layer, "token_adapter")}


def relative(pairs) -> float:
    """√(Σ ‖Δ - B A‖² / Σ ‖Δ‖²)."""
    lost, total = (sum(value**2 for value in values) for values in zip(*pairs, strict=True))
    return (lost / total) ** 0.5 if total else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Both


def by_peft_name(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{PREFIX}{key}": tensor.to(dtype).contiguous() for key, tensor in tensors.items()}


def write(output: Path, source: Path, base: str | None, config: dict, tensors: dict[str, Tensor]) -> None:
    """A LoRA folder, with the other files of the source's folder: tokenizer and template."""
    with atomic_folder(output) as target:
        write_adapter(target, config, tensors, base=base)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    say(f"adapter in {output}")


def sizes(settings: dict[str, dict]) -> dict:
    return {"modules": len(settings), "ranks": sorted({setting["rank"] for setting in settings.values()})}


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
