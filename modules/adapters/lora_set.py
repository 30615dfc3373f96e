"""Many LoRA adapters on one base, each row of a batch with its own or with none.

    y_i = W x_i + s_k · B_k A_k x_i            row i of the batch uses adapter k(i)

The product with W, nearly all of the work, is one for the whole batch; each adapter then adds to its own rows. So one
copy of the base serves, or trains, as many tasks as there are adapters in memory (arXiv:2311.03285 and
arXiv:2310.18547 build servers on this), and ranks, alphas and adapted layers may differ between them.

    adapters = LoRASet(model)
    adapters.add("sql", *read_adapter("runs/sql/adapter"))
    adapters.add("chat", *read_adapter("runs/chat/adapter"))
    with adapters.using(["sql", None, "chat"]):
        generate(model, prompts, max_new_tokens=64)

A row is a row: documents packed into one share its adapter. Parameters are called as PEFT calls them in memory,
`q_proj.lora_A.sql.weight`; they come frozen.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.lora_peft import factor_names
from modules.adapters.parts import FrozenLinear, first_few, modules_of, replace_modules
from modules.adapters.switch import base_layer


class Rows:
    """Which rows of the batch use which adapter; all layers of a model read the same one."""

    def __init__(self):
        self.count: int | None = None  # None: every batch, whatever its size
        self.groups: list[tuple[str, Tensor | None]] = []  # adapter, its rows (None: all)


class ManyLoRALinear(FrozenLinear):
    """A frozen linear layer with any number of low-rank additions, by name."""

    def __init__(self, base: nn.Linear, rows: Rows):
        super().__init__(base)
        self.lora_A, self.lora_B, self.scaling, self.rows = nn.ModuleDict(), nn.ModuleDict(), {}, rows

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        if self.rows.count not in (None, x.shape[0]):
            raise ValueError(f"the batch has {x.shape[0]} rows, adapters are named for {self.rows.count}")
        for name, rows in self.rows.groups:
            if name not in self.scaling:
                continue  # this adapter leaves the layer alone
            A, B = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
            added = F.linear(F.linear(x if rows is None else x[rows], A), B) * self.scaling[name]
            y = y + added if rows is None else y.index_add(0, rows, added)
        return y

    @torch.no_grad()
    def put(self, name: str, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> None:
        """Set an adapter. One of the same rank is overwritten in place: its parameters stay the same objects."""
        self.scaling[name] = scaling
        for parts, tensor in ((self.lora_A, A), (self.lora_B, B)):
            if name not in parts or parts[name].weight.shape != tensor.shape:
                parts[name] = nn.Linear(*reversed(tensor.shape), bias=False, device=self.weight.device, dtype=dtype)
                parts[name].requires_grad_(False)
            parts[name].weight.copy_(tensor)

    def drop(self, name: str) -> None:
        del self.scaling[name], self.lora_A[name], self.lora_B[name]


class LoRASet:
    """The adapters of a model, which is frozen and has none of its own. Layers that none names stay as they are."""

    def __init__(self, model: nn.Module):
        if adapted := [name for name, module in model.named_modules() if hasattr(module, "base_class")]:
            raise ValueError(f"{adapted[0]} has an adapter already: begin with the base model")
        self.model, self.rows, self.names = model.requires_grad_(False), Rows(), []

    @property
    def layers(self) -> dict[str, ManyLoRALinear]:
        return modules_of(self.model, ManyLoRALinear)

    def add(
        self, name: str, settings: dict[str, dict], tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        """Add what `checkpointing.adapters.read_adapter` returns. Raises ValueError for a name that is taken, and one
        that lists every module that the model lacks or whose shape differs; the model is then as before."""
        if name in self.names:
            raise ValueError(f"there is an adapter {name!r} already: replace or remove it")
        if not name.isidentifier():
            raise ValueError(f"{name!r} cannot name an adapter: letters, digits and _ only, no digit first")
        self._check(settings, tensors)
        self._put(name, settings, tensors, dtype)
        self.names.append(name)

    def replace(
        self, name: str, settings: dict[str, dict], tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        """Hot swap: other weights under a name that is in use. Rank, alpha and adapted layers may differ; where the
        rank is the same, the weights are overwritten in place. One that does not fit leaves the old one untouched."""
        self._known([name])
        self._check(settings, tensors)
        for path, layer in self.layers.items():
            if name in layer.scaling and path not in settings:
                layer.drop(name)
        self._put(name, settings, tensors, dtype)
        self._tidy()

    def get(self, name: str) -> tuple[dict[str, dict], dict[str, Tensor]]:
        """An adapter as `add` takes it, its tensors the parameters themselves: to save what was trained."""
        self._known([name])
        settings, tensors = {}, {}
        for path, layer in self.layers.items():
            if name in layer.scaling:
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                settings[path] = {"rank": len(A), "alpha": layer.scaling[name] * len(A)}
                tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        return settings, tensors

    def remove(self, name: str) -> None:
        """Forget an adapter. Layers that no adapter is left for become what they were."""
        self._known([name])
        if any(name == used for used, _ in self.rows.groups):
            raise ValueError(f"adapter {name!r} is in use: choose others first, use(None) for none")
        for layer in self.layers.values():
            if name in layer.scaling:
                layer.drop(name)
        self.names.remove(name)
        self._tidy()

    def use(self, names: str | Sequence[str | None] | None) -> None:
        """From now on: one adapter for every batch, one (or None) for each row of the batches to come, or None."""
        if names is None or isinstance(names, str):
            self._known([names] if names else [])
            self.rows.count, self.rows.groups = None, [(names, None)] if names else []
            return
        used = list(dict.fromkeys(name for name in names if name is not None))
        self._known(used)
        device = next(self.model.parameters()).device
        rows = {name: [i for i, other in enumerate(names) if other == name] for name in used}
        self.rows.count = len(names)
        everywhere = len(used) == 1 and None not in names
        self.rows.groups = [(n, None if everywhere else torch.tensor(rows[n], device=device)) for n in used]

    @contextmanager
    def using(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """`use`, within the block only."""
        before = self.rows.count, self.rows.groups
        self.use(names)
        try:
            yield
        finally:
            self.rows.count, self.rows.groups = before

    def _known(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.names]:
            raise ValueError(f"no adapter {', '.join(map(repr, unknown))}; there are {', '.join(self.names) or 'none'}")

    def _check(self, settings: dict[str, dict], tensors: dict[str, Tensor]) -> None:
        modules, wrong = dict(self.model.named_modules()), []
        for path in settings:
            layer, shapes = modules.get(path), [tuple(tensors[key].shape) for key in factor_names(path, tensors)]
            if isinstance(layer, nn.Embedding):
                wrong.append(f"{path} (an embedding, which is one for all rows here)")
            elif not isinstance(layer, nn.Linear):
                wrong.append(f"{path} (no such linear layer)")
            elif (shapes[0][1], shapes[1][0]) != (layer.in_features, layer.out_features):
                wrong.append(f"{path} (A {shapes[0]}, B {shapes[1]}, layer {tuple(layer.weight.shape)})")
        if wrong:
            raise ValueError(f"the adapter does not fit this model: {first_few(wrong)}")

    def _put(self, name: str, settings: dict[str, dict], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        layers = self.layers
        new = {p: ManyLoRALinear(self.model.get_submodule(p), self.rows) for p in settings if p not in layers}
        replace_modules(self.model, new)
        for path, setting in settings.items():
            A, B = (tensors[key] for key in factor_names(path, tensors))
            (layers | new)[path].put(name, A, B, setting["alpha"] / setting["rank"], dtype)

    def _tidy(self) -> None:
        bare = {path: base_layer(layer) for path, layer in self.layers.items() if not layer.scaling}
        replace_modules(self.model, bare)
