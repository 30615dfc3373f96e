"""The table of parameter-efficient methods. Each is one file that explains it, and holds these functions:

    add(model, options)                    put the method into a model and freeze everything else
    export(model)                          → (fields of PEFT's adapter_config.json, tensors by PEFT's name)
    load(model, config, tensors, dtype)    put a saved adapter into a model; → names of the modules that it changed

and one of these two, unless the method is a plain LoRA on disk,

    PEFT_TYPE = "…"                        the `peft_type` that is this method's alone
    opens(config)                          whether an adapter_config.json is this method's

and, where the method needs it,

    parameter_groups(trainable, lr)        parameters with learning rates of their own, for `build_optimizer(groups=…)`
    prepare_optimizer(model, optimizer)    what it does to gradients before a step
    check(options)                         ValueError for options that it cannot have; needs no model
    READS = ("rank", …)                    the flags that it reads (default: LoRA's)
    VECTORS = True                         it trains vectors only, which weight decay leaves alone
    NEEDS_DENSE = True                     its start is computed from the weights before they are quantised
    NEEDS_RESIDENT = "…"                   why weights cannot be streamed
    VIRTUAL_TOKENS = True                  every row begins with virtual tokens (modules/adapters/virtual_tokens.py)

A method replaces modules by ones that take over the frozen parameters. Such a module knows what it stands for, by
`base_class` (a linear layer) or `base_layer()`, and, where one plain module can do what it does, `merged()`:
modules/adapters/switch.py and recipes/merge.py ask for no more.
"""

import importlib
from types import ModuleType

from torch import nn

from modules.adapters.lora import check_sizes
from modules.adapters.options import Options

METHODS = {
    "lora": "modules.adapters.lora_peft",
    "rslora": "modules.adapters.methods.rslora",
    "dora": "modules.adapters.methods.dora",
    "lora-plus": "modules.adapters.methods.lora_plus",
    "lora-fa": "modules.adapters.methods.lora_fa",
    "pissa": "modules.adapters.methods.pissa",
    "olora": "modules.adapters.methods.olora",
    "vera": "modules.adapters.methods.vera",
    "loftq": "modules.adapters.methods.loftq",
    "eva": "modules.adapters.methods.eva",
    "prompt": "modules.adapters.methods.prompt_tuning",
    "p-tuning": "modules.adapters.methods.p_tuning",
    "prefix": "modules.adapters.methods.prefix_tuning",
    "ia3": "modules.adapters.methods.ia3",
    "bitfit": "modules.adapters.methods.bitfit",
    "ln": "modules.adapters.methods.ln_tuning",
    "houlsby": "modules.adapters.methods.houlsby",
    "pfeiffer": "modules.adapters.methods.pfeiffer",
    "parallel": "modules.adapters.methods.parallel",
}

READ_BY_LORA = ("rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern")


def find_method(name: str) -> ModuleType:
    """A method's file by its name in the table. ValueError for a name that is not there."""
    if name not in METHODS:
        raise ValueError(f"--method {name!r} is not one of {', '.join(METHODS)}")
    return importlib.import_module(METHODS[name])


def read_by(name: str) -> tuple[str, ...]:
    """The flags that a method reads, apart from those that all methods read."""
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
        method = find_method(name)
        if hasattr(method, "PEFT_TYPE"):
            found = config.get("peft_type") == method.PEFT_TYPE
        else:
            found = hasattr(method, "opens") and method.opens(config)
        if found:
            return name
    raise ValueError(f"peft_type {config.get('peft_type')!r} with these settings is none of {', '.join(METHODS)}")


def add_method(model: nn.Module, name: str, options: Options) -> None:
    """Put a method into a model; the model remembers which, for saving."""
    check_options(name, options)
    find_method(name).add(model, options)
    model.method = name
