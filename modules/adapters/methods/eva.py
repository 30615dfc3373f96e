"""EVA: LoRA that begins with the directions in which the layer's inputs vary (arXiv:2410.07170).

    y = W x + s · B A x        A = V[:r]ᵀ  [r, in], the r principal components of x on training data; B = 0

A x then holds as much of x's variance as r numbers can, and B's first gradients are the largest possible (Sec. 3). As
with LoRA training starts at the base model, and the base stays as it is. Layers whose inputs are more spread out get
more rank: of all layers' components, each at most 2 r, the r · layers with the largest share of their layer's variance
are kept (Sec. 3.3). Layers left without any stay frozen; α grows with the rank, so that s is the same everywhere.

The components come from a few forward passes over training batches, by incremental SVD [Ross et al. 2008]: with n rows
seen before, of mean μ and components V (singular values S), and m new rows X of mean μ', the SVD of

    [ S Vᵀ ;  X - μ' ;  √(n m / (n + m)) (μ - μ') ]

gives the next ones, so that nothing larger than a batch is ever held. Parameters and cost are LoRA's; on disk it is a
plain LoRA with a rank for each layer.
"""

from collections import Counter

import torch
from torch import Tensor, nn

from modules.adapters import lora_peft
from modules.adapters.lora import LoRALinear, lora_layers
from modules.adapters.options import Options
from modules.adapters.parts import replace_modules

MOST = 2  # ρ: no layer gets more than this times r
export, load = lora_peft.export, lora_peft.load


class IncrementalPCA:
    """The principal components of rows that come in batches."""

    def __init__(self, components: int):
        self.components, self.rows, self.total = components, 0, 0.0

    def add(self, X: Tensor) -> None:
        """X: [rows, in]."""
        X, n, m = X.float(), self.rows, X.shape[0]
        mean = X.mean(0)
        parts = [X - mean]
        if n:
            shift = (n * m / (n + m)) ** 0.5 * (self.mean - mean)
            parts = [self.S[:, None] * self.Vt, X - mean, shift[None]]
            mean = (n * self.mean + m * mean) / (n + m)
        self.total = self.total + sum(part.square().sum() for part in parts[n > 0 :])
        stacked = torch.cat(parts)
        with torch.random.fork_rng():  # a randomised SVD, the same in a resumed run
            torch.manual_seed(0)
            _, S, V = torch.svd_lowrank(stacked, q=min(2 * self.components, *stacked.shape), niter=4)
        self.S, self.Vt, self.mean, self.rows = S[: self.components], V.t()[: self.components], mean, n + m

    def shares(self) -> list[float]:
        """Of the variance, for each component."""
        return (self.S.square() / self.total).tolist()


def check(options: Options) -> None:
    if options.rank_pattern or options.alpha_pattern:
        raise ValueError("--method eva divides the ranks itself: leave out --rank-pattern and --alpha-pattern")


def add(model: nn.Module, options: Options) -> list[str]:
    if options.batches is None:
        raise ValueError("--method eva begins with training data: it needs options.batches")
    base = dict(model.named_modules())
    names = lora_peft.add(model, options)
    layers = {name: base[name] for name in lora_layers(model)}  # frozen layers, before their adapters
    found = components(model, lora_layers(model), options.batches, round(MOST * options.rank))
    ranked = sorted(((share, name) for name, pca in found.items() for share in pca.shares()), reverse=True)
    ranks = Counter(name for _, name in ranked[: options.rank * len(layers)])
    for name, layer in layers.items():
        if rank := ranks[name]:
            alpha = options.alpha * rank / options.rank
            layer = LoRALinear(layer, rank, alpha, options.dropout, options.dtype)
            with torch.no_grad():
                layer.lora_A.weight.copy_(found[name].Vt[:rank])
        replace_modules(model, {name: layer})
    return [name for name in names if name not in layers or ranks[name]]


@torch.no_grad()
def components(model: nn.Module, layers: dict[str, nn.Module], batches, components: int) -> dict[str, IncrementalPCA]:
    """Of every layer's inputs at the positions that have a target, over the batches."""
    found, last = {}, {}

    def see(name: str, x: Tensor) -> None:
        if last.get("x") is not x:  # q, k and v read one input, as do gate and up
            last.update(x=x, pca=found.get(name) or IncrementalPCA(components))
            last["pca"].add(x.flatten(0, -2)[last["batch"].target_index])
        found[name] = last["pca"]

    hooks = [m.register_forward_pre_hook(lambda m, args, name=n: see(name, args[0])) for n, m in layers.items()]
    training = model.training
    model.eval()
    for batch in batches:
        last["batch"] = batch
        model(batch.input_ids, batch.layout)
    model.train(training)
    for hook in hooks:
        hook.remove()
    if not found:
        raise ValueError("--method eva: there are no batches to begin with, or none reaches the target layers")
    return found
