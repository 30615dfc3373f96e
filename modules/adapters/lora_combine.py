"""One LoRA adapter from several, weighted. Nothing is trained, and the base model is not needed.

Adapter i adds s_i B_i A_i to a layer, s_i = α_i / r_i; w_i is its weight, perhaps negative. The result has scale 1.

    cat              A = [w_1 s_1 A_1; w_2 s_2 A_2; …]   B = [B_1, B_2, …]      B A = Σ w_i s_i B_i A_i, exactly
    svd              the best approximation of that sum of a given rank
    linear           A = Σ ±√|w_i s_i| A_i   B = Σ √|w_i s_i| B_i               the rank stays, but B A has the cross
                     terms √… B_i A_j, too, which belong to no adapter: a rough guess
    ties             trim, elect a sign, merge (arXiv:2306.01708, Alg. 1), on A and on B as with linear
    dare_linear      drop at random and rescale, then sum (arXiv:2311.03099)
    dare_ties        the same, then elect a sign and merge
    magnitude_prune  keep the largest, then sum
    *_svd            these last four on Δ_i = s_i B_i A_i, [out, in], instead of on A and B; then as svd

With t_i the tensors to be merged (A_i or B_i, or Δ_i), entry by entry, and d the density, the share that is kept:

    trim             the d · n entries of largest magnitude stay, the others become 0
    drop             m ~ Bernoulli(d): t_i ← m ⊙ t_i / d, so that the mean stays
    sign             γ = sign of Σ t_i (majority "total") or of Σ sign(t_i) ("frequency"), + where it is 0
    merge            Σ_{i : sign(t_i) = γ} w_i t_i / #{i : sign(t_i) = γ}

This is what peft's `add_weighted_adapter` computes, number for number, random drops included; only a single adapter is
not always taken to mean `linear`. The SVD of B A needs no [out, in] matrix: with QR factorisations B = Q_B R_B and
Aᵀ = Q_A R_A it follows from that of R_B R_Aᵀ, which is as small as the ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.adapters.lora_peft import factor_names

Adapter = tuple[dict[str, dict], dict[str, Tensor]]  # what `checkpointing.adapters.read_adapter` returns

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("cat", "svd", *ON_FACTORS, "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    generator: torch.Generator | None = None,
) -> Adapter:
    """The combined adapter; a module that some adapters lack is made from those that have it.

    `rank` is for svd and *_svd (default: the adapters' largest), `density` in (0, 1] for combinations that prune.
    Random drops come from `generator`, module after module in the order of the settings. Raises ValueError for
    settings that do not fit, and for ranks that differ where they must not.
    """
    _check(adapters, weights, combination, rank, density, majority)
    options = dict(density=density, majority=majority, generator=generator)
    rank = rank or max(setting["rank"] for modules, _ in adapters for setting in modules.values())
    settings, tensors = {}, {}
    for name in dict.fromkeys(name for modules, _ in adapters for name in modules):
        parts = []  # w · s, w, s, A, B of each adapter that has the module
        for (modules, of_adapter), w in zip(adapters, weights, strict=True):
            if name in modules:
                A, B = (of_adapter[key] for key in factor_names(name, of_adapter))
                parts.append((w, modules[name]["alpha"] / modules[name]["rank"], A.float(), B.float()))
        if len({(A.shape[1], B.shape[0]) for _, _, A, B in parts}) > 1:
            raise ValueError(f"{name} has different sizes in the adapters: they belong to different models")
        if combination in ("cat", "svd"):
            A = torch.cat([w * s * A for w, s, A, _ in parts])
            B = torch.cat([B for _, _, _, B in parts], dim=1)
            if combination == "svd":
                A, B = truncate(A, B, rank)
        elif combination in ON_FACTORS:
            if len(ranks := {A.shape[0] for _, _, A, _ in parts}) > 1:
                ranks = ", ".join(map(str, sorted(ranks)))
                raise ValueError(f"{combination} needs equal ranks; {name} has {ranks}: take cat or svd")
            roots = [abs(w * s) ** 0.5 for w, s, _, _ in parts]
            signed = [root if w * s >= 0 else -root for root, (w, s, _, _) in zip(roots, parts, strict=True)]
            A = merge([A for _, _, A, _ in parts], signed, combination, **options)
            B = merge([B for _, _, _, B in parts], roots, combination, **options)
        else:
            deltas = [s * (B @ A) for _, s, A, B in parts]
            delta = merge(deltas, [w for w, _, _, _ in parts], combination.removesuffix("_svd"), **options)
            A, B = factor(delta, rank)
        settings[name] = {"rank": A.shape[0], "alpha": A.shape[0]}
        of_first = next(of_adapter for modules, of_adapter in adapters if name in modules)
        tensors |= zip(factor_names(name, of_first), (A.contiguous(), B.contiguous()), strict=True)
    return settings, tensors


def merge(
    task_tensors: Sequence[Tensor],
    weights: Sequence[float],
    combination: str,
    *,
    density: float | None = None,
    majority: str = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One tensor from several of the same shape: linear, ties, dare_linear, dare_ties or magnitude_prune."""
    if combination.startswith("dare"):
        task_tensors = [drop(t, density, generator) for t in task_tensors]
    elif combination != "linear":
        task_tensors = [trim(t, density) for t in task_tensors]
    stacked = torch.stack(list(task_tensors))
    weighted = stacked * torch.tensor(weights, device=stacked.device).view(-1, *[1] * (stacked.ndim - 1))
    if not combination.endswith("ties"):
        return weighted.sum(0)
    votes = stacked.sum(0) if majority == "total" else stacked.sign().sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def trim(tensor: Tensor, density: float) -> Tensor:
    """Only the largest magnitudes, `density` of all."""
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[kept] = True
    return tensor * mask.view_as(tensor)


def drop(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-r approximation of B A: V[:r]ᵀ [r, in] and U[:r] S[:r] [out, r]."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.t())
    small_A, small_B = factor(R_B @ R_A.t(), rank)
    return small_A @ Q_A.t(), Q_B @ small_B


def factor(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same from the matrix itself; what it lacks in rank is filled with zeros."""
    U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
    A, B = Vt[:rank], U[:, :rank] * S[:rank]
    missing = rank - A.shape[0]
    if missing > 0:
        A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
    return A, B


def _check(adapters, weights, combination, rank, density, majority) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"there are {len(adapters)} adapters and {len(weights)} weights: give one weight to each")
    if combination not in COMBINATIONS:
        raise ValueError(f"combination {combination!r} is not one of {', '.join(COMBINATIONS)}")
    prunes = combination not in ("cat", "svd", "linear")
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"{combination} keeps a share of the entries: it needs a density in (0, 1], got {density}")
    if density is not None and not prunes:
        raise ValueError(f"a density is for combinations that prune; {combination} keeps everything")
    if rank is not None and not combination.endswith("svd"):
        raise ValueError(f"a rank is for svd and *_svd; that of {combination} follows from the adapters")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank {rank} must be at least 1")
    if majority not in ("total", "frequency"):
        raise ValueError(f"majority {majority!r} is not total or frequency")
