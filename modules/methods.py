"""The table of parameter-efficient methods. Each is one file that explains it, and holds these functions, which are
explained here for all of them:

    add(model, options)                    put the method into a model and freeze everything else
    export(model)                          → (fields of PEFT's adapter_config.json, tensors by PEFT's name)
    opens(config)                          whether an adapter_config.json is this method's
    load(model, config, tensors, dtype)    put a saved adapter into a model; → names of the modules that it changed

and, where the method needs it,

    parameter_groups(trainable, lr)        parameters with learning rates of their own, for `build_optimizer(groups=…)`
    prepare_optimizer(model, optimizer)    what it does to gradients before a step
    check(options)                         ValueError for options that it cannot have; needs no model
    READS = ("rank", …)                    the flags that it reads, if these are not LoRA's
    VECTORS = True                         it trains vectors only, which weight decay leaves alone
    NEEDS_DENSE = True                     its start is computed from the weights before they are quantised
    NEEDS_RESIDENT = "…"                   why weights cannot be streamed
    VIRTUAL_TOKENS = True                  every row begins with virtual tokens (modules/virtual_tokens.py)

A method replaces modules by ones that take over the frozen parameters. Such a module knows what it stands for, by
`base_class` (a linear layer) or `base_layer()`, and, where one plain module can do what it does, `merged()`:
modules/adapter_switch.py and recipes/merge.py ask for no more.
"""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from modules.lora import check_sizes, lora_layers

METHODS = {
    "lora": "modules.lora_peft",
    "rslora": "modules.rslora",
    "dora": "modules.dora",
    "lora-plus": "modules.lora_plus",
    "lora-fa": "modules.lora_fa",
    "pissa": "modules.pissa",
    "olora": "modules.olora",
    "vera": "modules.vera",
    "loftq": "modules.loftq",
    "eva": "modules.eva",
    "prompt": "modules.prompt_tuning",
    "p-tuning": "modules.p_tuning",
    "prefix": "modules.prefix_tuning",
    "ia3": "modules.ia3",
    "bitfit": "modules.bitfit",
    "ln": "modules.ln_tuning",
    "houlsby": "modules.houlsby",
    "pfeiffer": "modules.pfeiffer",
    "parallel": "modules.parallel",
}

READ_BY_LORA = ("rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Options:
    """What a method can be told; each reads what concerns it."""

    rank: int = 16
    """Of bottleneck adapters: the size of the bottleneck."""
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    """Modules to change, by name. None: those that the method stands for, of LoRA every linear layer of the blocks."""
    rank_pattern: dict[str, int] | None = None
    """Layers of LoRA and its relatives that get another rank, by name …"""
    alpha_pattern: dict[str, float] | None = None
    """… or another alpha."""
    dtype: torch.dtype = torch.float32
    """Of what is trained."""
    num_virtual_tokens: int = 20
    prompt_init: str = "vocabulary"
    """How virtual tokens begin: vocabulary, random or text."""
    prompt_ids: tuple[int, ...] = ()
    """The tokens of the text that they begin with."""
    prompt_encoder: str | None = None
    """The network that makes virtual tokens, mlp or lstm. None: the method's own choice."""
    encoder_size: int | None = None
    quantize: type[nn.Linear] | None = None
    """How frozen layers will be stored (NF4Linear, say), for starts that make up for its error."""
    batches: Iterable | None = None
    """Training micro-batches on the model's device, for starts computed from data."""


def find_method(name: str) -> ModuleType:
    """A method's file by its name in the table. ValueError for a name that is not there."""
    if name not in METHODS:
        raise ValueError(f"--method {name!r} is not one of {', '.join(METHODS)}")
    return importlib.import_module(METHODS[name])


def read_by(name: str) -> tuple[str, ...]:
    """The flags that a method reads, of those that not all of them do."""
    return getattr(find_method(name), "READS", READ_BY_LORA)


def check_options(name: str, options: Options) -> None:
    """Raise ValueError for options that a method cannot have: what can be known before there is a model."""
    if "rank" in read_by(name):
        check_sizes(options.rank, options.dropout, options.targets)
    if (options.rank_pattern or options.alpha_pattern) and "rank_pattern" not in read_by(name):
        raise ValueError(f"--rank-pattern and --alpha-pattern are LoRA's: --method {name} has no such layers")
    getattr(find_method(name), "check", lambda options: None)(options)


def method_of(config: dict) -> str:
    """The name of the method that wrote this adapter_config.json. ValueError if it is none of ours."""
    for name in METHODS:
        if find_method(name).opens(config):
            return name
    raise ValueError(f"peft_type {config.get('peft_type')!r} with these settings is none of {', '.join(METHODS)}")


def add_method(model: nn.Module, name: str, options: Options) -> None:
    """Put a method into a model; the model remembers which, for saving."""
    find_method(name).add(model, options)
    if (options.rank_pattern or options.alpha_pattern) and not lora_layers(model):
        raise ValueError(f"--rank-pattern and --alpha-pattern are LoRA's: --method {name} has no such layers")
    model.method = name
