"""What the methods share: frozen layers to add to, finding and replacing modules, and tensors by PEFT's name.

A method replaces a module by a subclass of it that takes over its parameters, so the base checkpoint's names still fit
(`q_proj.weight`, not `q_proj.base.weight`), and adds trained parameters, all of whose names begin with one word: the
`key` of the functions below.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from modules.adapters.peft_names import PREFIX


class FrozenLinear(nn.Linear):
    """A linear layer (nn.Linear or a subclass such as NF4Linear), frozen, for a subclass to add to.

    It calls `base_class.forward(self, x)`: the base's class knows how the weight is stored, and finds it here.
    """

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.base_class = type(base)
        self.requires_grad_(False).train(base.training)

    def frozen(self, x: Tensor) -> Tensor:
        return self.base_class.forward(self, x)

    def dense_weight(self) -> Tensor:
        """W, in whatever form it is stored; for a quantised layer this is a copy."""
        dense = getattr(self.base_class, "dense_weight", None)
        return dense(self) if dense else self.weight

    def dense(self, weight: Tensor | None = None, bias: Tensor | None = None) -> nn.Linear:
        """A plain layer with these float32 parameters (default: the frozen ones) in the frozen weight's dtype."""
        weight = self.dense_weight() if weight is None else weight
        bias = self.bias if bias is None else bias
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)
        return layer.train(self.training)


def adopt(module: nn.Module, base: nn.Module) -> None:
    """Let `module` take over all that `base` has: its parameters and sub-modules, shared, and its settings."""
    module.__dict__.update({name: dict(v) if isinstance(v, dict) else v for name, v in vars(base).items()})


def adopted(module: nn.Module, kind: type[nn.Module], *, without: str) -> nn.Module:
    """The inverse: a `kind` with all that `module` has except its sub-module `without`."""
    base = kind.__new__(kind)
    adopt(base, module)
    del base._modules[without]
    return base


class FrozenEmbedding(nn.Embedding):
    """An embedding (nn.Embedding or a subclass such as HostEmbedding), frozen, for a subclass to add to."""

    def __init__(self, base: nn.Embedding):
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight, self.base_class = base.weight, type(base)
        self.device = getattr(base, "device", base.weight.device)  # a HostEmbedding's is where its rows go
        self.requires_grad_(False).train(base.training)

    def frozen(self, ids: Tensor) -> Tensor:
        return self.base_class.forward(self, ids)

    def base_layer(self) -> nn.Embedding:
        """The embedding alone; its weight is shared."""
        base = self.base_class(self.num_embeddings, self.embedding_dim, device="meta")
        base.weight, base.device = self.weight, self.device
        return base.train(self.training)

    def dense(self, weight: Tensor) -> nn.Embedding:
        """A plain embedding with this weight, in the frozen weight's dtype."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        embedding.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        return embedding.train(self.training)


def modules_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """The model's modules of a class, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def match_names(names: Iterable[str], wanted: Sequence[str], flag: str, kind: str) -> list[str]:
    """The module names that `wanted` stands for, in full or by last components (`q_proj`, `self_attn.q_proj`).

    Raises ValueError, which speaks of the flag's values, for one that stands for none.
    """
    names = list(names)
    hits = {value: [name for name in names if f".{name}".endswith(f".{value}")] for value in wanted}
    if unknown := [value for value in wanted if not hits[value]]:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(f"{names_no(flag, unknown, kind)}; the model has {', '.join(known)}")
    return [name for name in names if any(name in hit for hit in hits.values())]


def find_targets(
    model: nn.Module, targets: Sequence[str], kind: type[nn.Module] = nn.Linear, called: str = "linear layer"
) -> dict[str, nn.Module]:
    """The modules of a class (`called` so in errors) that --targets names. ValueError for a target that names none."""
    if not targets:
        raise ValueError(f"--targets is empty: name at least one {called}")
    modules = modules_of(model, kind)
    return {name: modules[name] for name in match_names(modules, targets, "--targets", called)}


def names_no(flag: str, unknown: Sequence[str], kind: str) -> str:
    """The beginning of an error about a flag's values: `--targets q_prj names no linear layer`."""
    return f"{flag} {', '.join(unknown)} name{'s' * (len(unknown) == 1)} no {kind}"


def find_saved(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    key: str,
    kind: type[nn.Module] = nn.Linear,
    called: str = "linear layer",
) -> dict[str, nn.Module]:
    """The modules that a saved adapter's tensors belong to. Raises ValueError for those that the model lacks."""
    names = sorted({name.removeprefix(PREFIX).partition(f".{key}")[0] for name in tensors})
    modules = dict(model.named_modules())
    if missing := [f"{name} (no such {called})" for name in names if not isinstance(modules.get(name), kind)]:
        raise ValueError(f"it does not fit this model: {first_few(missing)}")
    if not names:
        raise ValueError("it holds no tensors")
    return {name: modules[name] for name in names}


def first_few(faults: Sequence[str], most: int = 3) -> str:
    """The first of many similar faults, for an error: an adapter for another model fits none of its modules."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return ", ".join(faults[:most]) + more


def put_in(
    model: nn.Module, new: Mapping[str, nn.Module], key: str = "", tensors: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Freeze the model and replace its modules by `new`, filled with a saved adapter's tensors if given; → names."""
    if tensors is not None:
        fill(tensors_of(new, key), tensors)
    model.requires_grad_(False)
    return replace_modules(model, new)


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> list[str]:
    for name, module in new.items():
        model.set_submodule(name, module)
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
def fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the parameters of the same names. Raises one ValueError for all that does not fit."""
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
