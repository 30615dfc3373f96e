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
from modules.adapters.parts import names_no
from modules.adapters.peft_names import look_up

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A frozen linear layer (nn.Linear or a subclass of it, such as NF4Linear) with a trained low-rank addition.

    `weight` and `bias` keep their names, so the base checkpoint's keys still fit; the adapter adds `lora_A.weight` and
    `lora_B.weight`, PEFT's names. The adapter is float32 unless said otherwise and is cast to x's dtype where used.

    For these keys (`q_proj.weight`, not `q_proj.base.weight`) the layer inherits from nn.Linear instead of holding one,
    and calls `base_class.forward(self, x)`: the base's class knows how the weight is stored, and finds it here.
    """

    embedding: type[LoRAEmbedding] | None = LoRAEmbedding
    """What `add_lora` puts in place of a target that is an embedding; None: it refuses such targets."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.base_class = type(base)  # knows how to multiply by the frozen weight, in whatever form it is stored
        self.requires_grad_(False)
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
        y = self.base_class.forward(self, x)
        a = F.linear(self.dropout(x), self.lora_A.weight.to(x.dtype))
        return y + F.linear(a, self.lora_B.weight.to(x.dtype)) * self.scaling

    def reset_adapter(self) -> None:
        """A as the reference implementation starts it, B zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def delta(self) -> Tensor:
        """(α/r) · B A, [out, in] float32: what merging adds to the weight."""
        return (self.lora_B.weight.float() @ self.lora_A.weight.float()) * self.scaling

    def dense_weight(self) -> Tensor:
        """W, whatever form it is stored in; of a quantised layer a copy."""
        dense = getattr(self.base_class, "dense_weight", None)
        return dense(self) if dense else self.weight

    def merged_weight(self) -> Tensor:
        """The one matrix, in float32, that does what W and the adapter do."""
        dense = self.dense_weight().float()
        return dense + self.delta().to(dense.device)  # streamed weights are in host memory

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs: W + (α/r) · B A, added in float32 and rounded to W's dtype once."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.merged_weight().to(self.weight.dtype), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

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
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    names = [name for name in layers if any(_names(target, name) for target in targets)]
    if unknown := [target for target in targets if not any(_names(target, name) for name in layers)]:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(f"{names_no('--targets', unknown, 'linear layer')}; the model has {', '.join(known)}")
    for flag, pattern in (("--rank-pattern", rank_pattern), ("--alpha-pattern", alpha_pattern)):
        if unknown := [key for key in pattern or {} if not any(look_up({key: True}, name, False) for name in names)]:
            raise ValueError(names_no(flag, unknown, "layer that --targets names"))
    model.requires_grad_(False)
    for name in names:
        kind = layer if isinstance(layers[name], nn.Linear) else getattr(layer, "embedding", None)
        if kind is None:
            raise ValueError(f"--targets {name} is an embedding, for which {layer.__name__} has no form")
        sizes = look_up(rank_pattern, name, rank), look_up(alpha_pattern, name, alpha)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, kind(layers[name], *sizes, dropout, dtype))
    return names


def check_sizes(rank: int, dropout: float, targets: Sequence[str] | None) -> None:
    if rank < 1:
        raise ValueError(f"--rank {rank} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout {dropout} must lie in [0, 1)")
    if targets is not None and not targets:
        raise ValueError("--targets is empty: name at least one linear layer, such as q_proj")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> None:
    """Replace every adapted layer by a plain linear layer with the same outputs (an NF4 base becomes dense)."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "merged"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.merged())


def _names(target: str, layer: str) -> bool:
    return layer == target or layer.endswith(f".{target}")
