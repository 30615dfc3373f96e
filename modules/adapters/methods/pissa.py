"""PiSSA: LoRA that begins with the principal singular vectors of the weight (arXiv:2404.02948).

LoRA starts from noise and zero, and its first steps go into finding a direction. PiSSA trains, from the first step on,
the part of W that does the most. With W = U S Vᵀ, s = α/r, and [:r] for the r largest singular values (Eq. 2 to 4):

    B = U[:r] √(S[:r]/s)  [out, r]     A = √(S[:r]/s) V[:r]ᵀ  [r, in]     W_res = W - s · B A  is frozen
    y = W_res x + s · B A x            at the start: W x, up to rounding

Shapes and parameter count are LoRA's. It converges faster and ends lower than LoRA (Sec. 5) and costs one SVD of each
weight at the start, seconds per large matrix. Over a 4-bit base W_res is what is quantised: without its largest part
it has a narrower distribution, and the error is smaller than that of QLoRA (Sec. 4). Use it with α = r.

This changes the frozen weight, so A and B alone are not saved, but their change since the start, as a plain LoRA of
rank 2 r over the published base (App. C; alpha doubles with the rank):

    s · B A - s · B₀ A₀ = s · [B, -B₀] [A; A₀]

which peft and vLLM open as it is. (Where W_res was quantised, its quantisation error is not included.)
The base, A₀ and B₀ follow from W alone: a resumed run computes them again and reads A and B from its checkpoint.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import lora_peft
from modules.adapters.lora import LoRALinear, lora_layers
from modules.adapters.options import Options
from modules.adapters.peft_names import PREFIX

NEEDS_DENSE = True


class PiSSALinear(LoRALinear):
    """A LoRALinear that has taken its start out of the frozen weight."""

    embedding = None

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        super().__init__(base, rank, alpha, dropout, dtype)
        if rank > min(self.in_features, self.out_features):
            raise ValueError(f"--rank {rank} exceeds the {self.out_features} × {self.in_features} of a layer")
        self.start_from(self.dense_weight().detach())

    @torch.no_grad()
    def start_from(self, W: Tensor) -> None:
        A, B = self.factors(W.float())
        self.lora_A.weight.copy_(A)
        self.lora_B.weight.copy_(B)
        self.register_buffer("start_A", self.lora_A.weight.detach().clone(), persistent=False)
        self.register_buffer("start_B", self.lora_B.weight.detach().clone(), persistent=False)
        residual = (W.float() - self.delta()).to(W.dtype)
        pack = getattr(self.base_class, "pack_weight", lambda dense: dense)
        # A new parameter: the old one may be the embedding, too.
        self.weight = nn.Parameter(pack(residual), requires_grad=False)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        root = (S[: self.rank] / self.scaling).sqrt()
        return root[:, None] * Vt[: self.rank], U[:, : self.rank] * root

    def base_layer(self) -> nn.Linear:
        return PiSSAStart(self)

    def quantize(self, kind: type[nn.Linear]) -> None:
        """Store the residual as this class of layer does."""
        self.base_class = kind
        self.weight = nn.Parameter(kind.pack_weight(self.weight.detach()), requires_grad=False)


class PiSSAStart(nn.Linear):
    """The layer as training began: W_res x + s · B₀ A₀ x, frozen, which is W x up to rounding."""

    def __init__(self, trained: PiSSALinear):
        super().__init__(trained.in_features, trained.out_features, trained.bias is not None, device="meta")
        self.weight, self.bias = trained.weight, trained.bias
        self.frozen, self.scaling = trained.base_class, trained.scaling
        self.A, self.B = trained.start_A, trained.start_B

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen.forward(self, x)
        return y + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scaling

    def dense_weight(self) -> Tensor:
        residual = getattr(self.frozen, "dense_weight", lambda layer: layer.weight)(self)
        return residual.float() + (self.B.float() @ self.A.float()) * self.scaling


def add(model: nn.Module, options: Options, layer: type[PiSSALinear] = PiSSALinear) -> list[str]:
    names = lora_peft.add(model, options, layer)
    if options.quantize:
        for layer in lora_layers(model).values():
            layer.quantize(options.quantize)
    return names


@torch.no_grad()
def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """The difference from the start, as a plain LoRA of twice the rank."""
    config, tensors = lora_peft.export(model)
    for name, layer in lora_layers(model).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([layer.lora_A.weight, layer.start_A])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([layer.lora_B.weight, -layer.start_B], dim=1)
    sizes = {key: 2 * config[key] for key in ("r", "lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):
        sizes[key] = {name: 2 * size for name, size in config[key].items()}
    return config | sizes, tensors


def opens(config: dict, start: str = "pissa") -> bool:
    """A folder that peft did not convert; ours are plain LoRAs."""
    return config.get("peft_type") == "LORA" and config.get("init_lora_weights") == start


def load(
    model: nn.Module,
    config: dict,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    layer: type[PiSSALinear] = PiSSALinear,
) -> list[str]:
    """A and B of such a folder, over the residual of this model's weights."""
    return lora_peft.load(model, config | {"init_lora_weights": True}, tensors, dtype, layer)
