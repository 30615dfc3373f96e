"""What a parameter-efficient method can be told."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


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
