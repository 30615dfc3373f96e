"""What is trained of a vision-language model: each of its three parts is frozen, gets LoRA, or is trained in full."""

from collections.abc import Sequence

import torch
from torch import nn

from models.vision_language import VisionLanguageModel
from modules.lora import add_lora


def train_parts(
    model: VisionLanguageModel,
    how: dict[str, str],
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    dtype: torch.dtype,
) -> dict[str, dict[str, nn.Parameter]]:
    """Freeze the model but for what `how` (part → "frozen", "lora" or "full") says; → trained parameters by part.

    `targets` names the language model's layers that get LoRA; of the other parts it is every linear layer. Raises
    ValueError if nothing is left to train.
    """
    if all(choice == "frozen" for choice in how.values()):
        raise ValueError(f"{', '.join(f'--{part}' for part in how)} are all frozen: there is nothing to train")
    model.requires_grad_(False)
    adapted = []
    for part, choice in how.items():
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and model.part_of(n) == part]
        if part == "language":
            names = [name for name in names if name.rpartition(".")[2] in targets]
        adapted += names if choice == "lora" else []
    if adapted:
        add_lora(model, targets=adapted, rank=rank, alpha=alpha, dropout=dropout, dtype=dtype)
    for name, parameter in model.named_parameters():
        if how[model.part_of(name)] == "full":
            parameter.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {part: {n: p for n, p in trained.items() if model.part_of(n) == part} for part in how}
