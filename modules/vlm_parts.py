"""What is trained of a vision-language model: each of its three parts is frozen, gets LoRA, or is trained in full."""

from collections.abc import Sequence

import torch
from torch import nn

from modules.lora import add_lora

PARTS = {  # part -> where its parameters are
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}


def train_parts(
    model: nn.Module,
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
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(PARTS[part])]
        if part == "language":
            names = [name for name in names if name.rpartition(".")[2] in targets]
        adapted += names if choice == "lora" else []
    if adapted:
        add_lora(model, targets=adapted, rank=rank, alpha=alpha, dropout=dropout, dtype=dtype)
    for name, parameter in model.named_parameters():
        if any(choice == "full" and name.startswith(PARTS[part]) for part, choice in how.items()):
            parameter.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {part: {n: p for n, p in trained.items() if n.startswith(PARTS[part])} for part in how}
