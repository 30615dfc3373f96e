"""LoftQ: LoRA over a quantised base, begun so that both together are close to the weight (arXiv:2310.08659).

QLoRA starts from the quantised weight, whose error the training must first undo. LoftQ gives the adapter the best
rank-r approximation of that error to begin with (Alg. 1, one iteration), with Q = quantise(W) and s = α/r:

    W - Q = U S Vᵀ      B = U[:r] √(S[:r]/s)  [out, r]      A = √(S[:r]/s) V[:r]ᵀ  [r, in]      Q + s · B A ≈ W

NF4's error is nearly noise, so rank 16 takes away only some per cent of it in a large matrix, and the more the larger
r is; the published gains are large at 2 and 3 bits and small at 4. Shapes and parameter count are LoRA's; the start
costs an SVD per matrix and needs the weights before quantisation.

The paper repeats this, quantising W - s · B A in the next round (`iterations`), which gains little more and leaves a
base that only this run has. With one iteration the base is the one that QLoRA trains on, and what is saved is a plain
LoRA over it: load it with `--quantize nf4`, or over the folder that `recipes/merge.py --quantize nf4` writes.
"""

import torch
from torch import Tensor, nn

from modules.adapters import lora_peft
from modules.adapters.lora import lora_layers
from modules.adapters.options import Options
from modules.adapters.parts import truncated_svd
from modules.quantization.quantize import stored_as

NEEDS_DENSE = True

export = lora_peft.export


def loftq(W: Tensor, rank: int, kind: type[nn.Linear], iterations: int = 1) -> tuple[nn.Linear, Tensor, Tensor]:
    """The quantised layer, A [r, in] and B [out, r] with Q + B A ≈ W, all from W [out, in] (Alg. 1)."""
    low_rank = torch.zeros_like(W, dtype=torch.float32)
    for _ in range(iterations):
        quantised = stored_as(kind, (W.float() - low_rank).to(W.dtype))
        U, S, Vt = truncated_svd(W.float() - quantised.dense_weight().float(), rank)
        root = S.sqrt()
        A, B = root[:, None] * Vt, U * root
        low_rank = B @ A
    return quantised, A, B


def check(options: Options) -> None:
    if options.quantize is None:
        raise ValueError("--method loftq makes up for the error of a quantised base: it needs --quantize nf4 or int4")


@torch.no_grad()
def add(model: nn.Module, options: Options) -> list[str]:
    names = lora_peft.add(model, options)
    for name, layer in lora_layers(model).items():
        if hasattr(layer.base_class, "dense_weight"):
            raise ValueError(f"--method loftq needs the weights before they are quantised; {name} is already")
        quantised, A, B = loftq(layer.weight, layer.rank, options.quantize)
        layer.base_class, layer.weight = options.quantize, quantised.weight
        layer.lora_A.weight.copy_(A / layer.scaling**0.5)
        layer.lora_B.weight.copy_(B / layer.scaling**0.5)
    return names


def opens(config: dict) -> bool:
    """peft's own LoftQ folders; ours are plain LoRAs."""
    return config.get("peft_type") == "LORA" and config.get("init_lora_weights") == "loftq"


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """A and B over a model that is quantised already."""
    names = lora_peft.load(model, config | {"init_lora_weights": True}, tensors, dtype)
    if dense := [name for name, layer in lora_layers(model).items() if not hasattr(layer.base_class, "dense_weight")]:
        raise ValueError(f"a LoftQ adapter belongs to a quantised base, and {dense[0]} is not: quantise it first")
    return names
