"""LoRA: low-rank adaptation (arXiv:2106.09685). The frozen weight W gets a trained addition of rank r.

    y = W x + (α/r) · B A x            A [r, in] random, B [out, r] zero, so training starts at the base model

For a 4096 × 4096 layer and r = 16 that is 131 thousand trained numbers instead of 16.8 million, and only they need
gradients and optimizer states. Over an NF4 weight the same layer is QLoRA (arXiv:2305.14314).
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.lora_embedding import LoRAEmbedding
from modules.adapters.parts import FrozenLinear, find_targets, modules_of, names_no, put_in
from modules.adapters.peft_names import look_up

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(FrozenLinear):
    """A frozen linear layer with a trained low-rank addition.

    The adapter adds `lora_A.weight` and `lora_B.weight`, PEFT's names. They are float32 by default and are cast to x's
    dtype where they are used.
    """

    embedding: type[LoRAEmbedding] | None = LoRAEmbedding
    """What `add_lora` puts in place of a target that is an embedding; None: it refuses such targets."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        super().__init__(base)
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)
        self.rank, self.alpha = rank, alpha
        self.dropout = nn.Dropout(dropout)
        self.reset_adapter()
        self.train(base.training)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        a = F.linear(self.dropout(x), self.lora_A.weight.to(x.dtype))
        return y + F.linear(a, self.lora_B.weight.to(x.dtype)) * self.scaling

    def reset_adapter(self) -> None:
        """A as the reference implementation starts it, B zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def delta(self) -> Tensor:
        """(α/r) · B A, [out, in] float32: what merging adds to the weight."""
        return (self.lora_B.weight.float() @ self.lora_A.weight.float()) * self.scaling

    def merged_weight(self) -> Tensor:
        """The one matrix, in float32, that does what W and the adapter do."""
        dense = self.dense_weight().float()
        return dense + self.delta().to(dense.device)  # streamed weights are in host memory

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs: W + (α/r) · B A, added in float32 and rounded to W's dtype once."""
        return self.dense(self.merged_weight())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    layer: type[LoRALinear] = LoRALinear,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[str]:
    """Freeze the model and replace its target layers by LoRALinear (or a relative, `layer`); returns their names.

    A target is a layer's full name or its last components (`q_proj`, `self_attn.q_proj`, `lm_head`, `embed_tokens`).
    None stands for every linear layer of the blocks. The patterns give layers named likewise another rank or alpha.
    Raises ValueError for a target that names no layer, and for a pattern that names none of the targets.
    """
    check_sizes(rank, dropout, targets)
    targets = ALL_LINEAR if targets is None else targets
    layers = find_targets(model, targets, nn.Linear | nn.Embedding)
    for flag, pattern in (("--rank-pattern", rank_pattern), ("--alpha-pattern", alpha_pattern)):
        if unknown := [key for key in pattern or {} if not any(look_up({key: True}, name, False) for name in layers)]:
            raise ValueError(names_no(flag, unknown, "layer that --targets names"))
    new = {}
    for name, base in layers.items():
        kind = layer if isinstance(base, nn.Linear) else getattr(layer, "embedding", None)
        if kind is None:
            raise ValueError(f"--targets {name} is an embedding, for which {layer.__name__} has no form")
        sizes = look_up(rank_pattern, name, rank), look_up(alpha_pattern, name, alpha)
        new[name] = kind(base, *sizes, dropout, dtype)
    return put_in(model, new)


def check_sizes(rank: int, dropout: float, targets: Sequence[str] | None) -> None:
    if rank < 1:
        raise ValueError(f"--rank {rank} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout {dropout} must lie in [0, 1)")
    if targets is not None and not targets:
        raise ValueError("--targets is empty: name at least one linear layer, such as q_proj")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return modules_of(model, LoRALinear)
