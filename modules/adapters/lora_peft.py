"""LoRA as a method, and on disk: PEFT's LoraConfig, which most of LoRA's relatives share.

A layer's tensors are `lora_A.weight` [r, in] and `lora_B.weight` [out, r] behind its name, an embedding's
`lora_embedding_A` [r, V] and `lora_embedding_B` [D, r]; relatives add theirs. The config holds one rank, alpha and
dropout, and patterns for the layers that have others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modules.adapters.lora import LoRALinear, add_lora, lora_layers
from modules.adapters.lora_embedding import LoRAEmbedding
from modules.adapters.options import Options
from modules.adapters.parts import find_saved, modules_of, put_in, tensors_of
from modules.adapters.peft_names import PREFIX, look_up, shorten_pattern, target_modules

KEY = "lora_"
# Features of PEFT's LoraConfig that change the arithmetic and that LoRALinear does not have.
UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "use_qalora")
UNSUPPORTED += ("alora_invocation_tokens", "use_bdlora", "kasa_config", "monteclora_config")
OTHER_START = ("pissa", "olora", "loftq")  # folders that these methods open
# Ways to begin that take a part of the base weight away: the adapter then belongs to another base than the published.
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add(model: nn.Module, options: Options, layer: type[LoRALinear] = LoRALinear) -> list[str]:
    sizes = dict(rank=options.rank, alpha=options.alpha, dropout=options.dropout)
    sizes |= dict(rank_pattern=options.rank_pattern, alpha_pattern=options.alpha_pattern)
    return add_lora(model, **sizes, targets=options.targets, dtype=options.dtype, layer=layer)


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    layers = lora_layers(model) | modules_of(model, LoRAEmbedding)
    tensors = tensors_of(layers, KEY)
    settings = {name: {"rank": layer.rank, "alpha": layer.alpha} for name, layer in layers.items()}
    targets = target_modules(layers, (name for name, _ in model.named_modules()))
    dropout = next((layer.dropout.p for layer in lora_layers(model).values()), 0.0)
    return config_of(settings, targets, dropout), tensors


def config_of(settings: Mapping[str, dict], targets: list[str] | str, dropout: float = 0.0) -> dict:
    """adapter_config.json for layers with these ranks and alphas."""
    rank, rank_pattern = shorten_pattern({name: setting["rank"] for name, setting in settings.items()})
    alpha, alpha_pattern = shorten_pattern({name: setting["alpha"] for name, setting in settings.items()})
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def opens(config: dict) -> bool:
    relative = config.get("use_dora") or config.get("use_rslora") or config.get("init_lora_weights") in OTHER_START
    relative = relative or config.get("lora_bias")  # BitFit
    return config.get("peft_type") == "LORA" and not relative


def load(
    model: nn.Module,
    config: dict,
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    layer: type[LoRALinear] = LoRALinear,
) -> list[str]:
    """Freeze the model and put a saved adapter into it, as layers of this class.

    Raises one ValueError for all modules that the model lacks, and one for all tensors that do not fit.
    """
    settings, tensors = read_layers(config, tensors)
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
    modules = find_saved(model, tensors, KEY, nn.Linear | nn.Embedding)
    new = {}
    for name, setting in settings.items():
        kind = layer if isinstance(modules[name], nn.Linear) else layer.embedding
        if kind is None:
            raise ValueError(f"it adapts {name}, an embedding, for which {layer.__name__} has no form")
        new[name] = kind(modules[name], setting["rank"], setting["alpha"], 0.0, dtype)
    return put_in(model, new, KEY, tensors)


def factor_names(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The names of a module's A and B among an adapter's tensors; an embedding's differ from a linear layer's."""
    if f"{name}.lora_embedding_A" in tensors:
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def read_layers(config: dict, tensors: dict[str, Tensor]) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Per module name its `rank` and `alpha`, and the tensors without PEFT's prefix.

    Which modules are adapted is read from the tensors. Raises ValueError for what LoRA does not have.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if found := [key for key in UNSUPPORTED if config.get(key)]:
        raise ValueError(f"it uses {', '.join(found)}, which plain LoRA does not have")
    if str(begin := config.get("init_lora_weights")).lower().startswith(OTHER_BASE):
        raise ValueError(
            f"init_lora_weights {begin!r} changed the base weights, too; save it from peft with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"lora_alpha is {config.get('lora_alpha')!r}, expected a number")
    # peft saves an adapted embedding's or head's frozen weight along: the base has it, too.
    tensors = {key.removeprefix(PREFIX): t for key, t in tensors.items() if ".base_layer." not in key}
    settings = {}
    for name in sorted({key.partition(".lora_")[0] for key in tensors}):
        found = sorted(key for key in tensors if key.startswith(f"{name}.lora_"))
        A, B = factor_names(name, tensors)
        if not {A, B} <= set(found):
            raise ValueError(f"{name} has {found}, expected lora_A.weight and lora_B.weight")
        shapes = [tuple(tensors[key].shape) for key in (A, B)]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ValueError(f"{name} has A {shapes[0]} and B {shapes[1]}, which share no rank")
        rank = shapes[0][0]
        alpha = look_up(config.get("alpha_pattern"), name, config["lora_alpha"])
        # rank-stabilised LoRA (arXiv:2312.03732) divides by √r: the same as a larger alpha
        settings[name] = {"rank": rank, "alpha": alpha * rank**0.5 if config.get("use_rslora") else alpha}
    if not settings:
        raise ValueError("it holds no tensors")
    return settings, tensors
