"""What is trained of a vision-language model: each of its three parts is frozen, gets LoRA, or is trained in full.

A projector that is trained in full, while the towers are frozen or adapted, is saved with the adapter as one of PEFT's
`modules_to_save` (modules/adapters/whole_modules.py).
"""

from collections.abc import Sequence

from torch import nn

from modules.adapters.lora import add_lora
from modules.adapters.parts import match_names
from modules.adapters.whole_modules import train_whole_modules
from modules.quantization.quantize import quantize_blocks


def check_parts(how: dict[str, str], *, quantize_head: bool = False) -> None:
    if all(choice == "frozen" for choice in how.values()):
        raise ValueError(f"{', '.join(f'--{part}' for part in how)} are all frozen: there is nothing to train")
    if quantize_head and how["language"] == "full":
        raise ValueError("--quantize-head: the head is trained with --language full, and quantised weights are frozen")


def quantize_parts(model: nn.Module, how: dict[str, str], kind: type[nn.Linear] | None, *, head: bool = False) -> None:
    """Keep both towers' linear layers in this kind, unless they are trained in full, and the head if wanted."""
    check_parts(how, quantize_head=head)
    if how["vision"] != "full":
        quantize_blocks(model.vision_tower, kind)
    if how["language"] != "full":
        language = model.language_model
        quantize_blocks(language, kind, head=head)
        model.lm_head = language.lm_head


def name_in_language_model(model: nn.Module, name: str) -> str:
    """What `model.language_model` calls the model's parameter `name`."""
    return name.replace(f"{model.parts['language']}.", "model.", 1)


def fits_adapter(how: dict[str, str]) -> bool:
    """Whether an adapter folder holds all that is trained: low-rank additions, and perhaps the whole projector."""
    return "lora" in how.values() and "full" not in (how["vision"], how["language"])


def train_parts(model: nn.Module, how: dict[str, str], *, targets: Sequence[str], **lora) -> None:
    """Freeze the model except for what `how` (part → "frozen", "lora" or "full") says.

    `targets` names the language model's layers that get LoRA; of the other parts it is every linear layer. `lora` are
    the other arguments of `add_lora`. Raises ValueError if nothing is left to train.
    """
    check_parts(how)
    model.requires_grad_(False)
    adapted = []
    for part, choice in how.items():
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and model.part_of(n) == part]
        if part == "language" and choice == "lora":
            names = match_names(names, targets, "--targets", "linear layer of the language model")
        adapted += names if choice == "lora" else []
    if adapted:
        add_lora(model, targets=adapted, **lora)
    if fits_adapter(how) and how["projector"] == "full":
        train_whole_modules(model, [model.parts["projector"]])
    for name, parameter in model.named_parameters():
        if how[model.part_of(name)] == "full":
            parameter.requires_grad_(True)


def groups_by_part(model: nn.Module, rates: dict[str, float | None], lr: float) -> list[dict]:
    """The trained parameters of each part, with its learning rate's ratio to `lr`, for `build_optimizer`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {
            "params": {name: p for name, p in trained.items() if model.part_of(name) == part},
            "lr_ratio": 1.0 if rate is None else rate / lr,
        }
        for part, rate in rates.items()
    ]
