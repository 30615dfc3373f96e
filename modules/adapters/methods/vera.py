"""VeRA: vector-based random matrix adaptation (arXiv:2310.11454).

LoRA with A and B random, frozen and the same for all layers; what a layer trains is how much of each direction it
takes (Eq. 2):

    y = W x + b ⊙ B (d ⊙ A x)        A [r, in], B [out, r] shared;  d [r] starts at 0.1, b [out] at 0

Layers of different sizes take the first columns of A and the first rows of B. A layer trains r + out numbers: for a
4096 × 4096 layer and r = 256 that is 4 thousand, where LoRA at r = 16 has 131 thousand; an 8B model's adapter is 6 MB,
and A and B need not be stored, since they follow from a seed. For many adapters on one base. It computes as much as
LoRA of the same rank, wants a high one (256) and a learning rate some ten times LoRA's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.lora import add_lora
from modules.adapters.options import Options
from modules.adapters.parts import FrozenLinear, fill, find_saved, modules_of, tensors_of
from modules.adapters.peft_names import target_modules

SEED = 0  # PEFT's projection_prng_key
D_START = 0.1
PEFT_TYPE = "VERA"
READS = ("rank", "dropout", "targets")
VECTORS = True


class VeRALinear(FrozenLinear):
    """A frozen linear layer with trained scales; its `vera_A` and `vera_B` (from `share`) are views of the shared."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        super().__init__(base)
        self.rank, self.dropout = rank, nn.Dropout(dropout)
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), D_START, device=base.weight.device, dtype=dtype))
        self.vera_lambda_b = nn.Parameter(torch.zeros(base.out_features, device=base.weight.device, dtype=dtype))
        self.train(base.training)

    def share(self, A: Tensor, B: Tensor) -> None:
        self.register_buffer("vera_A", A[:, : self.in_features], persistent=False)
        self.register_buffer("vera_B", B[: self.out_features], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.linear(self.dropout(x), self.vera_A.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)
        return self.frozen(x) + F.linear(a, self.vera_B.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs: W + diag(b) B diag(d) A."""
        b, d = self.vera_lambda_b.float(), self.vera_lambda_d.float()
        return self.dense(self.dense().weight.float() + (b[:, None] * self.vera_B) @ (d[:, None] * self.vera_A))


def add(model: nn.Module, options: Options) -> list[str]:
    """Options as for LoRA; there is no alpha: b takes its place."""
    sizes = dict(rank=options.rank, dropout=options.dropout, targets=options.targets, dtype=options.dtype)
    names = add_lora(model, **sizes, layer=VeRALinear)
    share(model, *projections(model, SEED))
    return names


def projections(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """A and B, large enough for the largest layer, number for number those that peft draws from this seed."""
    layers = modules_of(model, VeRALinear).values()
    rank = next(iter(layers)).rank
    generator = torch.Generator().manual_seed(seed)
    A = torch.empty(rank, max(layer.in_features for layer in layers))
    B = torch.empty(max(layer.out_features for layer in layers), rank)
    return tuple(M.uniform_(-math.sqrt(6 / M.shape[1]), math.sqrt(6 / M.shape[1]), generator=generator) for M in (A, B))


def share(model: nn.Module, A: Tensor, B: Tensor) -> None:
    layers = modules_of(model, VeRALinear)
    device = next(iter(layers.values())).weight.device
    A, B = A.float().to(device), B.float().to(device)
    for layer in layers.values():
        layer.share(A, B)


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    layers = modules_of(model, VeRALinear)
    tensors = tensors_of(layers, "vera_lambda_")
    # A and B go along if our seed does not give them: an opened adapter may have had another one, or another system's.
    A = max((layer.vera_A for layer in layers.values()), key=lambda A: A.shape[1]).cpu()
    B = max((layer.vera_B for layer in layers.values()), key=len).cpu()
    seeded = all(map(torch.equal, (A, B), projections(model, SEED)))
    if not seeded:
        tensors |= {"base_model.vera_A": A, "base_model.vera_B": B}
    first = next(iter(layers.values()))
    config = {
        "peft_type": PEFT_TYPE,
        "r": first.rank,
        "target_modules": target_modules(layers, (name for name, _ in model.named_modules())),
        "projection_prng_key": SEED,
        "save_projection": not seeded,
        "vera_dropout": first.dropout.p,
        "d_initial": D_START,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
    return config, tensors


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    if found := [key for key in ("modules_to_save", "fan_in_fan_out") if config.get(key)]:
        raise ValueError(f"it uses {', '.join(found)}, which VeRA does not have here")
    scales = {key: tensor for key, tensor in tensors.items() if ".vera_lambda_" in key}
    names = list(find_saved(model, scales, "vera_lambda_"))
    add_lora(model, rank=config["r"], targets=names, dtype=dtype, layer=VeRALinear)
    fill(tensors_of(modules_of(model, VeRALinear), "vera_lambda_"), scales)
    stored = (tensors.get("base_model.vera_A"), tensors.get("base_model.vera_B"))
    share(model, *(projections(model, config["projection_prng_key"]) if stored[0] is None else stored))
    return names
