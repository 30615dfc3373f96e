"""Modules trained in full next to an adapter: the last norm, the head, the embedding, a model's projector.

Low-rank additions stand in for the large matrices. What is small (a norm, a projector) or has to learn something new
altogether (a head for another language) can be trained as it is: its own parameters, in their own dtype, no additions.
It costs what full fine-tuning of these parameters costs, and each is saved entire, as PEFT's `modules_to_save`:

    base_model.model.<module>.<parameter>        adapter_config.json: "modules_to_save": [<module>, …]

A tied head (its weight is the embedding's) trains on its own: it, or the embedding, gets a copy, as in peft, and from
then on the model is an untied one. peft takes a name to mean every module whose full name *ends* with it, so that its
"norm" is `input_layernorm`, too; here `norm` is the last norm, and what is written are full names.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from modules.adapters.parts import fill, names_no
from modules.adapters.peft_names import PREFIX
from modules.adapters.vocabulary import EMBEDDING, HEAD, is_tied, untie_head


def train_whole_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Unfreeze the modules that `names` name, in full or by their last components; → their full names.

    Call it when weights are loaded and the method is in the model (which freezes everything). The model remembers
    them, for saving. A module of your own will do, too: a new head, say (`model.score = nn.Linear(D, 3)`).
    Raises ValueError for a name that is no module's, and for what cannot be trained as it is.
    """
    modules = dict(model.named_modules())
    hits = {wanted: [name for name in modules if f".{name}".endswith(f".{wanted}")] for wanted in names}
    if unknown := [wanted for wanted in names if not hits[wanted]]:
        own = sorted({name.split(".")[-2] for name, _ in model.named_parameters()})
        raise ValueError(f"{names_no('modules to save:', unknown, 'module')}; the model has {', '.join(own)}")
    found = _outermost({name for matched in hits.values() for name in matched})
    adapted = tuple(f"{n}." for n, m in modules.items() if hasattr(m, "base_class") or hasattr(m, "base_layer"))
    for key, p in model.named_parameters():
        if not key.startswith(tuple(f"{name}." for name in found)):
            continue
        if p.requires_grad and key.startswith(adapted):
            raise ValueError(f"modules to save: {key} belongs to an adapter; leave its module out of the targets")
        check_dtype(p.dtype)
    return _unfreeze(model, found)


def check_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise ValueError("modules to save: float16 cannot hold an Adam step; train in bfloat16 or float32")


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """What adapter_config.json says of them, and their tensors by PEFT's name; nothing where there are none."""
    names = getattr(model, "whole_modules", [])
    tensors = {f"{PREFIX}{n}.{key}": p for n in names for key, p in model.get_submodule(n).named_parameters()}
    return {"modules_to_save": names} if names else {}, tensors


def find_saved(model: nn.Module, config: dict, tensors: Iterable[str]) -> dict[str, list[str]]:
    """Modules that a folder's `modules_to_save` means, by peft's rule, each with PEFT's names of its tensors.

    Raises ValueError for a module that the folder has tensors of and the model has not.
    """
    wanted = tuple(config.get("modules_to_save") or ())
    own = [name for name, _ in model.named_modules()]
    for name in wanted:  # peft lists `classifier` and `score` for every classifier, and saves what there is
        if not any(n.endswith(name) for n in own) and any(f".{name}." in key for key in tensors):
            raise ValueError(f"this adapter was trained with a module `{name}` that this model does not have")
    if config.get("ensure_weight_tying") and is_tied(model) and any(name.endswith(EMBEDDING) for name in wanted):
        wanted += (HEAD,)  # peft saves the one tensor twice
    names = _outermost({name for name in own if name.endswith(wanted)})
    return {n: [f"{PREFIX}{n}.{key}" for key, _ in model.get_submodule(n).named_parameters()] for n in names}


def load(model: nn.Module, saved: dict[str, list[str]], tensors: dict[str, Tensor]) -> list[str]:
    """Fill the modules from `find_saved` with saved tensors and unfreeze them. ValueError for what does not fit."""
    names = _unfreeze(model, list(saved))
    parameters = {key: model.get_parameter(key.removeprefix(PREFIX)) for keys in saved.values() for key in keys}
    fill(parameters, {key: tensor for key, tensor in tensors.items() if key in parameters})
    return names


def _unfreeze(model: nn.Module, names: list[str]) -> list[str]:
    for name in names:
        for part in model.get_submodule(name).modules():
            if hasattr(part, "pack_weight"):
                raise ValueError(f"modules to save: {name}, whose {type(part).__name__} cannot be trained")
    if any(name.endswith((EMBEDDING, HEAD)) for name in names):
        untie_head(model)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    model.whole_modules = list(dict.fromkeys([*getattr(model, "whole_modules", []), *names]))
    return names


def _outermost(names: set[str]) -> list[str]:
    return sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names if other))
