"""What the files of the methods share: finding and replacing modules, frozen layers, and tensors by PEFT's name.

A method replaces a module by a subclass of it that takes over its parameters, so the base checkpoint's names still fit,
and adds trained ones, all of whose names begin with one word: the `key` of the functions below.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modules.adapters.peft_names import PREFIX


class FrozenLinear(nn.Linear):
    """A linear layer (nn.Linear or a subclass of it, such as NF4Linear), frozen, for a subclass to add to."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.base_class = type(base)  # knows how to multiply by the frozen weight, in whatever form it is stored
        self.requires_grad_(False).train(base.training)

    def frozen(self, x: Tensor) -> Tensor:
        return self.base_class.forward(self, x)

    def dense(self, weight: Tensor | None = None, bias: Tensor | None = None) -> nn.Linear:
        """A plain layer with these float32 parameters (default: the frozen ones) in the frozen weight's dtype."""
        if weight is None:
            dense_weight = getattr(self.base_class, "dense_weight", None)
            weight = dense_weight(self) if dense_weight else self.weight
        bias = self.bias if bias is None else bias
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)
        return layer.train(self.training)


def find_targets(model: nn.Module, targets: Sequence[str], kind: type[nn.Module] = nn.Linear) -> dict[str, nn.Module]:
    """The modules of a kind that --targets names, in full or by last components (`q_proj`, `self_attn.q_proj`).

    Raises ValueError for a target that names none.
    """
    if not targets:
        raise ValueError(f"--targets is empty: name at least one {kind.__name__}")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    hits = {target: [name for name in modules if f".{name}".endswith(f".{target}")] for target in targets}
    if unknown := [target for target in targets if not hits[target]]:
        known = sorted({name.rpartition(".")[2] for name in modules})
        raise ValueError(f"{names_no('--targets', unknown, kind.__name__)}; the model has {', '.join(known)}")
    return {name: module for name, module in modules.items() if any(name in names for names in hits.values())}


def names_no(flag: str, unknown: Sequence[str], kind: str) -> str:
    """How an error begins that accuses a flag's values: `--targets q_prj names no Linear`."""
    return f"{flag} {', '.join(unknown)} name{'s' * (len(unknown) == 1)} no {kind}"


def find_saved(
    model: nn.Module, tensors: Mapping[str, Tensor], key: str, kind: type[nn.Module] = nn.Linear
) -> dict[str, nn.Module]:
    """The modules that a saved adapter's tensors belong to. Raises ValueError for those that the model lacks."""
    names = sorted({name.removeprefix(PREFIX).partition(f".{key}")[0] for name in tensors})
    modules = dict(model.named_modules())
    if missing := [f"{name} (no such {kind.__name__})" for name in names if not isinstance(modules.get(name), kind)]:
        raise ValueError(f"it does not fit this model: {first_few(missing)}")
    if not names:
        raise ValueError("it holds no tensors")
    return {name: modules[name] for name in names}


def first_few(faults: Sequence[str], most: int = 3) -> str:
    """What an error lists of many like faults: an adapter for another model fits in none of its modules."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return ", ".join(faults[:most]) + more


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> list[str]:
    for name, module in new.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return list(new)


def tensors_of(layers: Mapping[str, nn.Module], key: str) -> dict[str, nn.Parameter]:
    """The trained parameters of replaced modules, by PEFT's name."""
    return {
        f"{PREFIX}{name}.{leaf}": p
        for name, layer in layers.items()
        for leaf, p in layer.named_parameters()
        if leaf.startswith(key)
    }


@torch.no_grad()
def fill(layers: Mapping[str, nn.Module], key: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the layers. Raises one ValueError for all that does not fit."""
    parameters = tensors_of(layers, key)
    wrong = [f"{name} is missing" for name in parameters.keys() - tensors.keys()]
    wrong += [f"{name} is not used" for name in tensors.keys() - parameters.keys()]
    for name in parameters.keys() & tensors.keys():
        if (found := tuple(tensors[name].shape)) != (expected := tuple(parameters[name].shape)):
            wrong.append(f"{name} is {found}, expected {expected}")
    if wrong:
        raise ValueError(f"it does not fit this model: {first_few(sorted(wrong))}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def truncated_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples of W [m, n]: U [m, r], S [r] downwards, Vᵀ [r, n], in W's dtype.

    W Wᵀ = U S² Uᵀ, and Vᵀ = S⁻¹ Uᵀ W: the eigenvectors of the smaller of W Wᵀ and Wᵀ W, formed in float64, take a fifth
    of the time that all triples take. What the squares lose lies 8 digits below the largest. (PiSSA takes all triples,
    in float32, because peft does: the rounding of its start is part of what it saves.)
    """
    if W.shape[0] > W.shape[1]:
        U, S, Vt = truncated_svd(W.t(), rank)
        return Vt.t(), S, U.t()
    wide = W.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())  # upwards
    S, U = squares.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
    Vt = U.t() @ wide / S.clamp(min=torch.finfo(S.dtype).tiny)[:, None]
    return U.to(W.dtype), S.to(W.dtype), Vt.to(W.dtype)
