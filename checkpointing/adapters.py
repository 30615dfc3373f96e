"""LoRA adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

PEFT's keys are the module's name behind `base_model.model.`, with `.lora_A.weight` [r, in] and `.lora_B.weight`
[out, r]. Our module names are transformers' own, so nothing is renamed.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from checkpointing.pretrained import read_json
from checkpointing.safetensors_file import specs_of, write_safetensors
from modules.lora import LoRALinear, lora_layers

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Features of PEFT's LoraConfig that change the arithmetic and that LoRALinear does not have.
UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "use_qalora")
UNSUPPORTED += ("alora_invocation_tokens", "use_bdlora", "kasa_config", "monteclora_config")
# Ways to begin that take a part of the base weight away: the adapter then belongs to another base than the published.
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(folder: Path, model: nn.Module, *, base: str, chat_template: str | None = None) -> None:
    """Write the model's LoRA layers so that `peft.PeftModel.from_pretrained` opens them over `base`."""
    layers = lora_layers(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "target_modules": target_modules(layers, (name for name, _ in model.named_modules())),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TENSORS, specs_of(tensors), tensors.__getitem__)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def target_modules(adapted: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """What PEFT must be told to adapt exactly these modules: short names where they are unambiguous, else full ones."""
    adapted = set(adapted)
    short = sorted({name.rpartition(".")[2] for name in adapted})
    inside_adapter = tuple(f"{name}." for name in adapted)
    candidates = [name for name in all_modules if not name.startswith(inside_adapter)]
    hit = {n for n in candidates if any(n == s or n.endswith(f".{s}") for s in short)}
    return short if hit == adapted else sorted(adapted)


def read_adapter(folder: Path) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """A PEFT LoRA folder as (settings, tensors): per module name `rank` and `alpha`, and `lora_A`/`lora_B` tensors by
    `<module>.lora_A.weight`.

    Which modules are adapted is read from the tensors. Raises ValueError for other methods and for damaged files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--adapter {folder} is not a folder")
    if not (folder / CONFIG).is_file():
        hint = f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).is_file() else ""
        raise ValueError(f"--adapter {folder} holds no {CONFIG}{hint}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if found := [key for key in UNSUPPORTED if config.get(key)]:
        raise ValueError(f"{folder / CONFIG} uses {', '.join(found)}, which plain LoRA does not have")
    if str(begin := config.get("init_lora_weights")).lower().startswith(OTHER_BASE):
        raise ValueError(
            f"{folder / CONFIG}: init_lora_weights {begin!r} changed the base weights, too; save it from peft with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{folder / CONFIG}: lora_alpha is {config.get('lora_alpha')!r}, expected a number")
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / TENSORS} is missing or damaged: {error}") from None
    settings = {}
    for name in sorted({key.partition(".lora_")[0] for key in tensors}):
        pair = {key for key in tensors if key.startswith(f"{name}.lora_")}
        if pair != {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}:
            raise ValueError(f"{folder / TENSORS}: {name} has {sorted(pair)}, expected lora_A.weight and lora_B.weight")
        shapes = [tuple(tensors[f"{name}.lora_{x}.weight"].shape) for x in "AB"]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ValueError(f"{folder / TENSORS}: {name} has A {shapes[0]} and B {shapes[1]}, which share no rank")
        rank = shapes[0][0]
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        # rank-stabilised LoRA (arXiv:2312.03732) divides by √r: the same as a larger alpha
        settings[name] = {"rank": rank, "alpha": alpha * rank**0.5 if config.get("use_rslora") else alpha}
    if not settings:
        raise ValueError(f"{folder / TENSORS} holds no tensors")
    return settings, tensors


def load_adapter(model: nn.Module, folder: Path, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Add a PEFT LoRA adapter to a model that has none; returns the names of the adapted layers.

    Raises one ValueError that lists every module that the model lacks or whose shapes differ.
    """
    settings, tensors = read_adapter(folder)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wrong = []
    for name in settings:
        shapes = [tuple(tensors[f"{name}.lora_{x}.weight"].shape) for x in "AB"]
        if name not in linear:
            wrong.append(f"{name} (no such linear layer)")
        elif (shapes[0][1], shapes[1][0]) != (linear[name].in_features, linear[name].out_features):
            wrong.append(f"{name} (A {shapes[0]}, B {shapes[1]}, layer {tuple(linear[name].weight.shape)})")
    if wrong:
        raise ValueError(f"{folder} does not fit this model: {', '.join(wrong)}")
    for name, setting in settings.items():
        parent, _, leaf = name.rpartition(".")
        layer = LoRALinear(linear[name], setting["rank"], setting["alpha"], 0.0, dtype)
        with torch.no_grad():
            layer.lora_A.weight.copy_(tensors[f"{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(tensors[f"{name}.lora_B.weight"])
        setattr(model.get_submodule(parent), leaf, layer)
    return list(settings)


def _pattern(patterns: dict | None, name: str, default: float) -> float:
    """PEFT's alpha_pattern: a key is a regular expression for a module's last components."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
