"""New tokens: single rows of the embedding and of the head are trained, all others stay bit for bit.

A token that the model has never seen (`<tool>`, a language's letters) needs a row in the embedding, to be read, and one
in the head, to be written. `--new-tokens` gives both matrices new rows, the mean of the old ones to begin with
(modules/adapters/vocabulary.py), and trains these rows alone, R [n, D] for n tokens:

    e(i) = R[k] if token i is the k-th of them, else E[i]        logits: h Eᵀ, the columns of the n tokens being h Rᵀ

That is n · D numbers per matrix (8 thousand for two tokens of an 8B Llama) and needs no gradient for the other rows.
A tied head shares the rows as it shares the embedding. On disk it is PEFT's `trainable_token_indices`:

    base_model.model.<module>.token_adapter.trainable_tokens_delta  [n, D], the rows themselves
    adapter_config.json: "trainable_token_indices": {"embed_tokens": [ids], "lm_head": [ids]}, of a tied model the first

To open it, peft wants the base's vocabulary resized first (`resize_token_embeddings`); every row that this adds is one
of those in the adapter. The tokenizer with the new tokens is saved with them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.parts import FrozenEmbedding, FrozenLinear, fill, replace_modules
from modules.adapters.peft_names import PREFIX
from modules.adapters.vocabulary import EMBEDDING, HEAD, embedding_name, is_tied

KEY = "token_adapter.trainable_tokens_delta"


class TokenRows(nn.Module):
    """The trained rows, [n, D], of tokens `ids` in a matrix with V rows."""

    def __init__(self, ids: Sequence[int], weight: Tensor, device: torch.device, dtype: torch.dtype):
        super().__init__()
        ids = torch.tensor(ids)
        rows = weight.detach()[ids.to(weight.device)]
        self.trainable_tokens_delta = nn.Parameter(rows.to(device, dtype, copy=True))  # PEFT's name
        place = torch.full((len(weight),), -1).index_copy_(0, ids, torch.arange(len(ids)))
        self.register_buffer("ids", ids.to(device), persistent=False)
        self.register_buffer("place", place.to(device), persistent=False)  # [V]: which row is a token's, or -1


class TokenRowsEmbedding(FrozenEmbedding):
    """A frozen embedding of which some rows are trained."""

    def __init__(self, base: nn.Embedding, rows: TokenRows):
        super().__init__(base)
        self.token_adapter = rows

    def forward(self, ids: Tensor) -> Tensor:
        x = self.frozen(ids)
        place = self.token_adapter.place[ids.to(x.device)]
        rows = F.embedding(place.clamp(min=0), self.token_adapter.trainable_tokens_delta).to(x.dtype)
        return torch.where((place >= 0)[..., None], rows, x)

    def merged(self) -> nn.Embedding:
        """A plain embedding with the trained rows."""
        return self.dense(_with_rows(self.weight, self.token_adapter))


class TokenRowsHead(FrozenLinear):
    """A frozen head of which some rows are trained."""

    def __init__(self, base: nn.Linear, rows: TokenRows):
        super().__init__(base)
        self.token_adapter = rows

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.frozen(hidden)
        own = F.linear(hidden, self.token_adapter.trainable_tokens_delta.to(hidden.dtype))
        return logits.index_copy_(-1, self.token_adapter.ids, own)  # in place: logits are large

    def merged(self) -> nn.Linear:
        """A plain head with the trained rows."""
        return self.dense(_with_rows(self.weight, self.token_adapter))


def train_token_rows(model: nn.Module, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """Train the rows of tokens `ids`, in `dtype`, in a loaded model that has its method and modules to save already.

    Call `grow_vocabulary` first. In a matrix that is trained in full they are trained anyway. Raises ValueError if the
    embedding or the head has an adapter.
    """
    if not ids:
        return
    for name in (embedding_name(model), HEAD):
        if hasattr(model.get_submodule(name), "merged"):
            raise ValueError(f"--new-tokens: {name} has an adapter already; leave it out of --targets")
    frozen = [n for n in (embedding_name(model), HEAD) if not model.get_submodule(n).weight.requires_grad]
    if len(frozen) == 1 and getattr(model, "was_tied", False):
        raise ValueError("--new-tokens: in a tied model embedding and head are trained in full together or not at all")
    _put_rows(model, {name: list(ids) for name in frozen}, dtype)


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """What adapter_config.json says of the rows, and their tensors by PEFT's name; nothing where there are none."""
    tensors = _saved_rows(model)
    names = [name.removeprefix(PREFIX).removesuffix(f".{KEY}") for name in tensors]
    indices = {n.rpartition(".")[2]: model.get_submodule(n).token_adapter.ids.tolist() for n in names}
    return {"trainable_token_indices": indices} if indices else {}, tensors


def _saved_rows(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained rows by PEFT's name; those that embedding and head share once."""
    return {f"{PREFIX}{name}": p for name, p in model.named_parameters() if name.endswith(KEY)}


def find_saved(config: dict) -> dict[str, list[int]]:
    """`trainable_token_indices` as a dictionary; a bare list is the embedding's."""
    indices = config.get("trainable_token_indices") or {}
    return indices if isinstance(indices, dict) else {EMBEDDING: indices}


def load(model: nn.Module, saved: dict[str, list[int]], tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Put saved rows into a model whose vocabulary has them. Raises ValueError for what does not fit."""
    places = {EMBEDDING: embedding_name(model), HEAD: HEAD}
    if unknown := [name for name in saved if name.rpartition(".")[2] not in places]:
        raise ValueError(f"trainable_token_indices of {', '.join(unknown)}: supported are {EMBEDDING} and {HEAD}")
    indices = {places[name.rpartition(".")[2]]: list(ids) for name, ids in saved.items()}
    if is_tied(model) and places[EMBEDDING] in indices:
        indices.setdefault(HEAD, indices[places[EMBEDDING]])
    _put_rows(model, indices, dtype)
    parameters = _saved_rows(model)
    fill(parameters, {key: tensor for key, tensor in tensors.items() if key in parameters})
    return list(indices)


def _put_rows(model: nn.Module, indices: dict[str, list[int]], dtype: torch.dtype) -> None:
    """Replace these modules; the same rows of a tied embedding and head are one parameter."""
    device, shared = model.lm_head.weight.device, is_tied(model) and len({tuple(i) for i in indices.values()}) == 1
    rows = {name: TokenRows(ids, model.get_submodule(name).weight, device, dtype) for name, ids in indices.items()}
    if shared:
        rows = dict.fromkeys(rows, next(iter(rows.values())))
    kinds = {name: TokenRowsHead if name == HEAD else TokenRowsEmbedding for name in indices}
    replace_modules(model, {name: kinds[name](model.get_submodule(name), rows[name]) for name in indices})


@torch.no_grad()
def _with_rows(weight: Tensor, rows: TokenRows) -> Tensor:
    return weight.index_copy(0, rows.ids.to(weight.device), rows.trainable_tokens_delta.to(weight))
