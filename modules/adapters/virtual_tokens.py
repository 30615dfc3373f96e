"""Virtual tokens: trained vectors in front of every row. What prompt tuning, P-tuning and prefix tuning share.

With n of them a row begins with n placeholders, token ids from 2³⁰ on, where no vocabulary reaches. From there on they
are tokens: they take the positions 0 … n - 1 of every document, --seq-len and the cache count them, packing and padding
need not know. No target falls on them. `load_dataset(virtual_ids=…)` puts them in front of the rows of a file,
`generate` in front of prompts; to call the model with other token ids, pass `[*virtual_ids(model), *ids]`.

    prompt_tuning.py    their embeddings are trained
    p_tuning.py         their embeddings come out of a trained network
    prefix_tuning.py    the keys and values that every layer has for them are trained

On disk all of them are PEFT's: one tensor, `prompt_embeddings` [n, …]. PEFT opens it to compute with; to train it
there, build the model with `get_peft_model` and copy the tensor.

B batch, T tokens, D model, n virtual tokens.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.options import Options
from modules.adapters.parts import FrozenEmbedding

FIRST = 2**30  # the first placeholder's token id
KEY = "prompt_embeddings"
FREQUENT = 5000  # tokens among which a start is drawn: a vocabulary begins with the most frequent ones


def placeholders(count: int) -> list[int]:
    return list(range(FIRST, FIRST + count))


def pick_virtual_tokens(method: ModuleType, wanted: int | None, text_ids: Sequence[int]) -> int:
    """How many a method puts in front of each row: `wanted`, else the number of text tokens, else 20; or none."""
    if not hasattr(method, "VIRTUAL_TOKENS"):
        return 0
    return len(text_ids) or 20 if wanted is None else wanted


def virtual_ids(model: nn.Module) -> list[int]:
    """The token ids that every row of this model begins with; none unless a method put them there."""
    embedding = getattr(model.model, "embed_tokens", None)
    count = embedding.virtual_tokens if isinstance(embedding, VirtualEmbedding) else 0
    return placeholders(count)


class Table(nn.Module):
    """n vectors that are trained as they are."""

    def __init__(self, rows: Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(rows.detach().to(dtype, copy=True))

    def forward(self) -> Tensor:
        return self.weight


class VirtualEmbedding(FrozenEmbedding):
    """A frozen embedding that gives placeholder i the row i of `prompt()` [n, D].

    Without a prompt all of them get token 0's row: prefix tuning replaces what is computed there.
    """

    def __init__(self, base: nn.Embedding, count: int, prompt: nn.Module | None = None):
        super().__init__(base)
        self.virtual_tokens, self.prompt = count, prompt

    def forward(self, ids_BT: Tensor) -> Tensor:
        virtual_BT = ids_BT >= FIRST
        hidden_BTD = self.frozen(ids_BT.masked_fill(virtual_BT, 0))
        if self.prompt is None:
            return hidden_BTD
        which_BT = (ids_BT - FIRST).clamp(min=0).to(hidden_BTD.device)
        prompt_BTD = F.embedding(which_BT, self.prompt().to(hidden_BTD.dtype))
        return torch.where(virtual_BT[..., None].to(hidden_BTD.device), prompt_BTD, hidden_BTD)


def add_embedding(model: nn.Module, count: int, prompt: nn.Module | None = None) -> list[str]:
    """Freeze the model and replace its embedding."""
    device = model.model.norm.weight.device
    model.requires_grad_(False)
    prompt = None if prompt is None else prompt.to(device)
    model.model.embed_tokens = VirtualEmbedding(model.model.embed_tokens, count, prompt)
    return ["model.embed_tokens"]


def check(model: nn.Module, count: int) -> None:
    if not hasattr(model.model, "embed_tokens"):
        raise ValueError(f"virtual tokens are for text models, and this is a {type(model).__name__}")
    if virtual_ids(model):
        raise ValueError("the model has virtual tokens already")
    check_count(count)


def check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"--num-virtual-tokens {count} must be at least 1")


def check_encoder(options: Options) -> None:
    if options.encoder_size is not None and options.encoder_size < 1:
        raise ValueError(f"--encoder-size {options.encoder_size} must be at least 1")


def check_start(options: Options) -> None:
    """Raise ValueError for an impossible number, encoder or start."""
    check_count(options.num_virtual_tokens)
    check_encoder(options)
    if options.prompt_ids and options.prompt_init != "text":
        raise ValueError(f"--prompt-text is read with --prompt-init text, not {options.prompt_init}")
    if options.prompt_init == "text" and not options.prompt_ids:
        raise ValueError("--prompt-init text begins with the tokens of a text: it needs --prompt-text")


def start_ids(model: nn.Module, options: Options) -> list[int] | None:
    """The n tokens that virtual tokens begin as, by --prompt-init; None: at random.

    Of a text its tokens, cut or repeated to n; of the vocabulary n of its most frequent ones (arXiv:2104.08691,
    Sec. 3.2).
    """
    check(model, count := options.num_virtual_tokens)
    if options.prompt_init == "random":
        return None
    if options.prompt_init == "vocabulary":
        return torch.randint(min(FREQUENT, model.config.vocab_size), (count,)).tolist()
    if options.prompt_init != "text":
        raise ValueError(f"--prompt-init {options.prompt_init!r} is not one of vocabulary, random, text")
    ids = list(options.prompt_ids)
    return (ids * -(-count // len(ids)))[:count]


def config_of(model: nn.Module, peft_type: str) -> dict:
    """The fields of PEFT's adapter_config.json that these methods share."""
    return {
        "peft_type": peft_type,
        "num_virtual_tokens": len(virtual_ids(model)),
        "token_dim": model.config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": model.config.num_attention_heads,
        "num_layers": len(model.blocks),
        "modules_to_save": None,
    }


def read_table(model: nn.Module, config: dict, tensors: Mapping[str, Tensor], width: int) -> Tensor:
    """A saved adapter's one tensor, [n, width]. Raises ValueError if it is another."""
    if list(tensors) != [KEY] or tensors[KEY].ndim != 2 or tensors[KEY].shape[1] != width:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise ValueError(f"it does not fit this model: it holds {found or 'nothing'}, expected {KEY} [n, {width}]")
    check(model, count := len(tensors[KEY]))
    if config.get("num_virtual_tokens") != count:  # what rows are made by
        raise ValueError(f"num_virtual_tokens is {config.get('num_virtual_tokens')!r}, but {KEY} has {count} rows")
    return tensors[KEY]


def load_prompt(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Put a saved table of embeddings into the model, to be trained as it is."""
    rows = read_table(model, config, tensors, model.config.hidden_size)
    return add_embedding(model, len(rows), Table(rows, dtype))
