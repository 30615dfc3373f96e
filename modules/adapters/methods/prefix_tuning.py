"""Prefix tuning: the keys and values of n tokens that nobody wrote, in every layer (arXiv:2101.00190, Eq. 3).

    attention_l(x) = softmax(q [K_l; k]ᵀ / √H) [V_l; v]          K_l, V_l [n, kv heads · H], trained

k and v are the text's, K_l and V_l a cache that is trained instead of computed. Prompt tuning trains what the first
layer reads; here every layer is addressed. With L layers these are 2 · n · L · kv heads · H numbers: 1.3 million for 20
virtual tokens in Llama 3 8B. Use it where one model serves many tasks, as nothing but a cache is exchanged; at the same
size LoRA mostly learns more, and it merges. PEFT's positions are kept: the prefix stands at 0 … n - 1 (its keys count
as rotated there), the text behind it.

`--prompt-init` says how it begins. `vocabulary` (the default) and `text` take the keys and values that the model itself
computes for n tokens, so that training starts at this text in front of every row: real activations are the better
start (Sec. 7.4). `random` is small and normal.

`--prompt-encoder mlp` makes the prefix by a network, as the paper does it for stability (Sec. 4.3) and PEFT calls
`prefix_projection`, with E [n, kv heads · H], one W_1 for all layers and S = --encoder-size (default 512):

    [K_l; V_l] = W_2,l tanh(W_1 E + b_1) + b_2,l          begins at random; 34 million numbers more in Llama 3 8B

It is saved as the prefix that it makes; to go on training the network, --resume the run.

Every row holds n placeholders (virtual_tokens.py), whose keys and values are replaced here. What else the
layers compute at their places nobody sees: n tokens' work per row, the price of needing no case of its own elsewhere.

B batch, T tokens, K key/value heads, H head dim, C = 2 · K · H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.options import Options
from modules.adapters.parts import adopt, adopted, replace_modules
from modules.adapters.virtual_tokens import KEY, Table, add_embedding, check_start, config_of, read_table, start_ids
from modules.attention import Attention, SequenceLayout, padded_layout

PEFT_TYPE = "PREFIX_TUNING"
VIRTUAL_TOKENS = True  # tells the recipes to put n placeholders in front of every row
READS = ("num_virtual_tokens", "prompt_init", "prompt_text", "prompt_encoder", "encoder_size")


class PrefixAttention(Attention):
    """Attention in which the first n tokens of every document have the keys and values `prefix()`, [n, 2 · K · H]."""

    def __init__(self, base: Attention, prefix: nn.Module):
        adopt(self, base)  # Attention's own __init__ would make four new layers
        self.prefix = prefix.to(base.q_proj.weight.device)
        self.train(base.training)

    def base_layer(self) -> Attention:
        return adopted(self, Attention, without="prefix")

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        k_BKTH, v_BKTH = super().keys_and_values(x, cos, sin, layout)
        prefix = self.prefix().to(k_BKTH.dtype)
        n, positions_BT = len(prefix), layout.positions  # which count anew in every document; [1, T] if all are alike
        rows_BTC = F.embedding(positions_BT.clamp(max=n - 1), prefix)
        prefix_k, prefix_v = rows_BTC.unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        virtual = (positions_BT < n)[:, None, :, None]
        return torch.where(virtual, prefix_k, k_BKTH), torch.where(virtual, prefix_v, v_BKTH)


class SharedEncoder(nn.Module):
    """tanh(W_1 E + b_1), [n, S], which all layers project on."""

    def __init__(self, count: int, dim: int, size: int, dtype: torch.dtype):
        super().__init__()
        self.embedding = nn.Embedding(count, dim, dtype=dtype)
        self.hidden = nn.Linear(dim, size, dtype=dtype)

    def forward(self) -> Tensor:
        return torch.tanh(self.hidden(self.embedding.weight))


class ProjectedPrefix(nn.Module):
    """W_2 tanh(W_1 E + b_1) + b_2, [n, 2 · K · H]; the encoder is one for all layers."""

    def __init__(self, encoder: SharedEncoder, dtype: torch.dtype):
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(encoder.hidden.out_features, 2 * encoder.hidden.in_features, dtype=dtype)

    def forward(self) -> Tensor:
        return self.project(self.encoder())


def check(options: Options) -> None:
    check_start(options)
    if options.prompt_encoder not in (None, "mlp"):
        raise ValueError(f"--prompt-encoder {options.prompt_encoder!r}: of prefix tuning it is mlp, or none is given")


def add(model: nn.Module, options: Options) -> list[str]:
    ids, width = start_ids(model, options), kv_width(model)
    count = options.num_virtual_tokens
    if options.prompt_encoder == "mlp":
        encoder = SharedEncoder(count, width, options.encoder_size or 512, options.dtype)
        return put(model, [ProjectedPrefix(encoder, options.dtype) for _ in model.blocks], count)
    rows = cached(model, ids) if ids else [torch.randn(count, 2 * width) * 0.02 for _ in model.blocks]
    return put(model, [Table(row, options.dtype) for row in rows], count)


def put(model: nn.Module, prefixes: list[nn.Module], count: int) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    add_embedding(model, count)
    layers = [block.self_attn for block in model.blocks]
    pairs = zip(layers, prefixes, strict=True)
    return replace_modules(model, {names[id(layer)]: PrefixAttention(layer, prefix) for layer, prefix in pairs})


@torch.no_grad()
def cached(model: nn.Module, ids: list[int]) -> list[Tensor]:
    """Of each block, the keys and values that the model computes for these tokens, [n, 2 · K · H]."""
    weight = model.model.norm.weight
    caches = model.make_caches(1, len(ids))
    layout = padded_layout(len(ids)).prepare(weight.device, weight.dtype)
    model(torch.tensor([ids], device=weight.device), layout, caches)
    return [torch.cat([x[0].transpose(0, 1).flatten(1) for x in (c.keys, c.values)], dim=1) for c in caches]


def kv_width(model: nn.Module) -> int:
    return model.config.num_key_value_heads * model.config.head_dim


@torch.no_grad()
def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    config = {"token_dim": kv_width(model), "num_attention_heads": model.config.num_key_value_heads}
    config |= {"prefix_projection": False, "encoder_hidden_size": None}
    table = torch.cat([block.self_attn.prefix() for block in model.blocks], dim=1)  # [n, layers · 2 · K · H]
    return config_of(model, PEFT_TYPE) | config, {KEY: table}


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    table = read_table(model, config, tensors, len(model.blocks) * 2 * kv_width(model))
    return put(model, [Table(rows, dtype) for rows in table.chunk(len(model.blocks), dim=1)], len(table))
