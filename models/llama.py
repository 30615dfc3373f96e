"""Llama, from Llama 1 to 3.3 and everything that shares its architecture (TinyLlama, SmolLM2, Vicuna, …).

This file holds the configuration, the order of the layers and the model around them. What a layer computes stands in
modules/: attention.py, feed_forward.py, norm.py and rotary_embedding.py.

Module names are those of the Hugging Face checkpoint, so the state dict *is* the checkpoint. The model returns hidden
states; modules/loss.py turns them into a loss without the full logits, the largest tensor of a training step.

B batch, T tokens, D model, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import call

import torch
from torch import Tensor, nn

from models.foreign_settings import refuse_foreign_settings
from modules.attention import Attention, KVCache, SequenceLayout, padded_layout
from modules.feed_forward import ACTIVATIONS, FeedForward
from modules.norm import RMSNorm
from modules.rotary_embedding import RotaryEmbedding, rope_parameters


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope: dict
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """From a config.json. Raises ValueError for settings that this file does not implement."""
        missing = [key for key in ("vocab_size", "hidden_size", "num_attention_heads") if not config.get(key)]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: not a complete Llama configuration")
        refuse_foreign_settings(config)
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        if head_dim % 2 or heads % kv_heads:
            raise ValueError(f"config.json: head_dim {head_dim} must be even, {heads} heads a multiple of {kv_heads}")
        derived = {"head_dim": head_dim, "num_key_value_heads": kv_heads, "rope": rope_parameters(config)}
        given = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        parsed = cls(**given | derived)
        if parsed.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {parsed.hidden_act!r} in config.json is not one of {', '.join(ACTIVATIONS)}")
        return parsed

    @property
    def max_length(self) -> int:
        """Positions that the checkpoint was made for, its rotary scaling included."""
        factor = self.rope.get("factor") or 1.0
        if self.rope["rope_type"] in ("linear", "dynamic"):
            return int(self.max_position_embeddings * factor)
        trained = self.rope.get("original_max_position_embeddings", 0)
        return max(self.max_position_embeddings, int(trained * factor))


_LLAMA3 = {
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
_ROPE3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_1 = _LLAMA3 | {"rope_scaling": _ROPE3 | {"factor": 8.0}}
_LLAMA3_2 = _LLAMA3 | {"rope_scaling": _ROPE3 | {"factor": 32.0}, "tie_word_embeddings": True}


def _shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return dict(zip(names, (hidden, ffn, layers, heads, kv_heads), strict=True))


PRESETS: dict[str, dict] = {  # as in each checkpoint's config.json
    "llama-2-7b": {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    | _shape(4096, 11008, 32, 32, 32),
    "llama-3-8b": _LLAMA3 | {"max_position_embeddings": 8192} | _shape(4096, 14336, 32, 32, 8),
    "llama-3.1-8b": _LLAMA3_1 | _shape(4096, 14336, 32, 32, 8),
    "llama-3.2-1b": _LLAMA3_2 | _shape(2048, 8192, 16, 32, 8) | {"head_dim": 64},
    "llama-3.2-3b": _LLAMA3_2 | _shape(3072, 8192, 28, 24, 8) | {"head_dim": 128},
    "llama-3.3-70b": _LLAMA3_1 | _shape(8192, 28672, 80, 64, 8),
    "tinyllama-1.1b": {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
    | _shape(2048, 5632, 22, 32, 4),
    "smollm2-135m": {
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
    }
    | {"tie_word_embeddings": True}
    | _shape(576, 1536, 30, 9, 3),
}


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): [B, T, D] → [B, T, D]."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.index = index
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, the blocks, the last norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope, config.max_position_embeddings)
        self.run_block: Callable[..., Tensor] = call  # memory options put another way to run a block here

    def forward(
        self, input_ids: Tensor, layout: SequenceLayout | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        return self.run_embedded(self.embed_tokens(input_ids), layout, caches)

    def run_embedded(
        self, hidden: Tensor, layout: SequenceLayout | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """From embeddings on, [B, T, D] → [B, T, D], for sequences that hold more than text."""
        if layout is None:
            layout = padded_layout(hidden.shape[1]).prepare(hidden.device, hidden.dtype)
        cos, sin = self.rotary(layout.positions, layout.longest, hidden.dtype)
        for i, block in enumerate(self.layers):
            hidden = self.run_block(block, hidden, cos, sin, layout, caches[i] if caches else None)
        return self.norm(hidden)


class LlamaForCausalLM(nn.Module):
    """A Llama with its language-model head; `model` and `lm_head`, if given, are those of a larger model."""

    def __init__(self, config: LlamaConfig, model: LlamaModel | None = None, lm_head: nn.Linear | None = None):
        super().__init__()
        self.config = config
        self.model = model or LlamaModel(config)
        self.lm_head = lm_head or nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self, input_ids: Tensor, layout: SequenceLayout | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm, for token ids [B, T]; without a layout, plain causal rows."""
        return self.model(input_ids, layout, caches)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] → [.., V]: the one way to logits, for losses (modules/loss.py), evaluation and generation alike."""
        return self.head(hidden)

    @property
    def head(self) -> nn.Linear:
        """The layer that makes the logits, whatever a model calls it."""
        return self.lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the config says so; call again after replacing either."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def make_caches(self, batch: int, slots: int) -> list[KVCache]:
        """Empty key/value caches, one per block, for texts of up to `slots` tokens."""
        weight = self.model.norm.weight
        shape = (batch, self.config.num_key_value_heads, slots, self.config.head_dim)
        return [KVCache(*shape, weight.device, weight.dtype) for _ in self.blocks]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start from scratch as the checkpoint family does: N(0, initializer_range), zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    # How checkpoints call these parameters (see checkpointing/pretrained.py): as we do.
    names_on_disk = ({},)
    names_read: dict[str, str] | None = None
    unread = ()
