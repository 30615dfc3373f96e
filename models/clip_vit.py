"""CLIP's vision transformer (arXiv:2103.00020): the eye of LLaVA and of many others.

An image is cut into patches, each becomes a token, a class token stands before them; every token sees every other.
Module names are those of transformers' CLIPVisionModel, `pre_layrnorm` (sic) included. The model returns the hidden
states of the requested layers and runs no block after the last of them: LLaVA reads the last layer but one.

I images, C channels, S image size, P patches, T = 1 + P tokens, D model, N heads, H head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import call
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.feed_forward import ACTIVATIONS


@dataclass(frozen=True)
class CLIPVisionConfig:
    kinds: ClassVar[tuple[str, ...]] = ("clip_vision_model",)
    """What config.json may call this tower (`model_type`)."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_factor: float = 1.0
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPVisionConfig":
        """From a config.json or its `vision_config`. Raises ValueError for settings that are not implemented here."""
        if (kind := config.get("model_type", cls.kinds[0])) not in cls.kinds:
            supported = ", ".join(map(repr, cls.kinds))
            raise ValueError(f"the vision tower in config.json is {kind!r}; supported: {supported}")
        parsed = cls(**{field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None})
        if parsed.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {parsed.hidden_act!r} in config.json is not one of {', '.join(ACTIVATIONS)}")
        if config.get("attention_dropout"):
            raise ValueError("attention_dropout in config.json is not 0: attention here has no dropout; set it to 0")
        if not isinstance(parsed.image_size, int) or not isinstance(parsed.patch_size, int):
            raise ValueError("image_size and patch_size in config.json must be one number each: images are square here")
        if parsed.patch_size > parsed.image_size or parsed.hidden_size % parsed.num_attention_heads:
            raise ValueError(
                f"config.json: patch_size {parsed.patch_size} must fit into image_size {parsed.image_size}, "
                f"hidden_size {parsed.hidden_size} be a multiple of {parsed.num_attention_heads} heads"
            )
        return parsed

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads


_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
PRESETS: dict[str, dict] = {  # as in each checkpoint's config.json
    "clip-vit-base-patch32": {"patch_size": 32},
    "clip-vit-base-patch16": {"patch_size": 16},
    "clip-vit-large-patch14": _LARGE,
    "clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
}


class CLIPEmbeddings(nn.Module):
    """A class token, then the image's patches row by row, each with its position added: [I, C, S, S] → [I, T, D]."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.expected = (config.num_channels, config.image_size, config.image_size)
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + config.patches, dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[1:] != self.expected:
            got, expected = (" × ".join(map(str, shape)) for shape in (pixel_values.shape, self.expected))
            raise ValueError(f"pixel values are {got}, expected images × {expected}")
        patches_IDHW = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches_IPD = patches_IDHW.flatten(2).transpose(1, 2)
        class_token_I1D = self.class_embedding.expand(len(pixel_values), 1, -1)
        return torch.cat([class_token_I1D, patches_IPD], dim=1) + self.position_embedding.weight


class CLIPAttention(nn.Module):
    """softmax(q kᵀ / √H) v, every token seeing every other that `mask` [I, 1, 1, T] shows: [I, T, D] → [I, T, D]."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        dim, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        I, T, _ = x.shape  # noqa: E741
        projected = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q_INTH, k_INTH, v_INTH = (y.view(I, T, -1, self.head_dim).transpose(1, 2) for y in projected)
        out_INTH = F.scaled_dot_product_attention(q_INTH, k_INTH, v_INTH, attn_mask=mask)
        return self.out_proj(out_INTH.transpose(1, 2).reshape(I, T, -1))


class CLIPFeedForward(nn.Module):
    """fc2(act(fc1(x))): [.., D] → [.., D]."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): [I, T, D] → [I, T, D]."""

    def __init__(self, config: CLIPVisionConfig, index: int):
        super().__init__()
        self.index = index
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPFeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPBlock(config, i) for i in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """What CLIP's and SigLIP's towers share: `embeddings`, an `encoder`, and a `post_layernorm`."""

    def __init__(self, config: CLIPVisionConfig, embeddings: nn.Module):
        super().__init__()
        self.config = config
        self.embeddings = embeddings
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.run_block: Callable[..., Tensor] = call  # memory options put another way to run a block here

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    # What modules/memory/activations.py asks of a model: `model.model` runs the blocks and ends in `norm`.
    @property
    def model(self) -> "VisionTransformer":
        return self

    @property
    def norm(self) -> nn.LayerNorm:
        return self.post_layernorm

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start from scratch as transformers does: normal with the spread of each kind, zero biases, unit norms."""
        for name, parameter in self.named_parameters():
            *_, layer, leaf = ("", *name.split("."))
            if leaf == "bias":
                parameter.zero_()
            elif "norm" in layer:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.initial_spread(layer, leaf), generator=generator)

    def initial_spread(self, layer: str, leaf: str) -> float:
        return self.config.initializer_range


class CLIPVisionModel(VisionTransformer):
    """Embedding, a norm, the blocks, and a norm for the class token of the last layer (`pool`)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config, CLIPEmbeddings(config))
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Hidden states [I, T, D] of these layers (default: all), in this order, for pixel values [I, C, S, S].

        Layer 0 is the input of the first block, layer n the output of the n-th, -1 the last one.
        """
        numbers = range(len(self.blocks) + 1)
        wanted = numbers if layers is None else [numbers[layer] for layer in layers]
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        states = {0: hidden}
        for number, block in enumerate(self.blocks[: max(wanted)], start=1):
            hidden = self.run_block(block, hidden)
            if number in wanted:
                states[number] = hidden
        return [states[number] for number in wanted]

    def pool(self, last_hidden: Tensor) -> Tensor:
        """[I, T, D] of the last layer → [I, D]: the image as CLIP compares it with text."""
        return self.post_layernorm(last_hidden[:, 0])

    def tie_weights(self) -> None:
        """No two names share a parameter here."""

    def initial_spread(self, layer: str, leaf: str) -> float:
        config, width = self.config, self.config.hidden_size
        into_residual = (2 * config.num_hidden_layers * width) ** -0.5
        spreads = {"q_proj": into_residual, "k_proj": into_residual, "v_proj": into_residual, "fc2": into_residual}
        spreads |= {"out_proj": width**-0.5, "fc1": (2 * width) ** -0.5, "class_embedding": width**-0.5}
        return spreads.get(leaf, spreads.get(layer, config.initializer_range)) * config.initializer_factor

    # What checkpoints call these parameters, our prefix → theirs: in transformers 5; in an older CLIPVisionModel and in
    # any CLIPModel, whose text half stays unread.
    names_on_disk = ({}, {"": "vision_model."})
    names_read: dict[str, str] | None = None
    """The one that the weights were loaded from."""
    unread = ("text_model.*", "logit_scale", "visual_projection.*", "text_projection.*")
