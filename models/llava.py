"""LLaVA (arXiv:2304.08485, arXiv:2310.03744): a CLIP vision transformer, a projector of two layers, and a Llama.

What leaves one of the vision tower's last layers is projected to the Llama's width, and stands in the embedded sequence
where the text holds image tokens. From there on it is a Llama, the one of models/llama.py: `model.language_model`.
Module names are transformers' in-memory ones; how the folders in the wild call the same tensors stands at the end.

B batch, T tokens, D width of the Llama, I images, C channels, S image size, P patches (one more with the class token).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.clip_vit import PRESETS as CLIP_PRESETS
from models.clip_vit import CLIPBlock, CLIPVisionConfig, CLIPVisionModel
from models.llama import LlamaBlock, LlamaConfig, LlamaForCausalLM, LlamaModel
from modules.attention import KVCache, SequenceLayout
from modules.feed_forward import ACTIVATIONS
from modules.image_tokens import Images, put_features

# Published configurations leave out what equals transformers' defaults, which are Llama 1's.
_LLAMA_DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "num_attention_heads": 32}


@dataclass(frozen=True)
class LlavaConfig:
    text: LlamaConfig
    vision: CLIPVisionConfig
    image_token: int
    """Id of the token that the image's features take the place of."""
    feature_layers: tuple[int, ...]
    """Layers of the vision tower whose hidden states are projected, side by side."""
    keep_class_token: bool
    """Whether the class token is a feature, too (`vision_feature_select_strategy` "full")."""
    projector_act: str = "gelu"
    projector_bias: bool = True

    @classmethod
    def from_dict(cls, config: dict) -> "LlavaConfig":
        """From a config.json. Raises ValueError for settings that this file does not implement."""
        if missing := [key for key in ("text_config", "vision_config") if not isinstance(config.get(key), dict)]:
            raise ValueError(f"config.json lacks {', '.join(missing)}: not a complete LLaVA configuration")
        text_config = _LLAMA_DEFAULTS | config["text_config"]
        if (kind := text_config.get("model_type", "llama")) != "llama":
            raise ValueError(f"the language model in config.json is {kind!r}; supported: 'llama'")
        if config.get("tie_word_embeddings"):  # old folders say it here
            text_config["tie_word_embeddings"] = True
        text, vision = LlamaConfig.from_dict(text_config), CLIPVisionConfig.from_dict(config["vision_config"])
        layers = config.get("vision_feature_layer", -2)
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        depth = vision.num_hidden_layers
        if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
            raise ValueError(f"vision_feature_layer {list(layers)} in config.json: layers are 0 to {depth}, -1 is last")
        selection = config.get("vision_feature_select_strategy", "default")
        if selection not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy {selection!r} in config.json is not default or full")
        activation = config.get("projector_hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"projector_hidden_act {activation!r} in config.json is not one of {', '.join(ACTIVATIONS)}"
            )
        image_token = config.get("image_token_index", config.get("image_token_id", 32000))
        if not 0 <= image_token < text.vocab_size:
            raise ValueError(f"image_token_index {image_token} in config.json has no row in {text.vocab_size} tokens")
        bias = config.get("multimodal_projector_bias", True)
        return cls(text, vision, image_token, layers, selection == "full", activation, bias)

    @property
    def tokens_per_image(self) -> int:
        return self.vision.patches + self.keep_class_token

    # What data and generation ask of any model.
    @property
    def max_length(self) -> int:
        return self.text.max_length

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def tie_word_embeddings(self) -> bool:
        return self.text.tie_word_embeddings


_VISION = {"model_type": "clip_vision_model"} | CLIP_PRESETS["clip-vit-large-patch14-336"]
_VICUNA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
PRESETS: dict[str, dict] = {  # as in each checkpoint's config.json
    "llava-1.5-7b": {"vision_config": _VISION, "text_config": _VICUNA, "image_token_index": 32000},
    "llava-1.5-13b": {"vision_config": _VISION, "text_config": _VICUNA | _VICUNA_13B, "image_token_index": 32000},
}


class Projector(nn.Module):
    """linear_2(act(linear_1(x))): [I, P, layers · width of the vision tower] → [I, P, D]."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        width, dim = config.vision.hidden_size * len(config.feature_layers), config.text.hidden_size
        self.linear_1 = nn.Linear(width, dim, bias=config.projector_bias)
        self.linear_2 = nn.Linear(dim, dim, bias=config.projector_bias)
        self.activation = ACTIVATIONS[config.projector_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))

    @torch.no_grad()
    def init_weights(self, scale: float, generator: torch.Generator | None = None) -> None:
        """N(0, scale), zero biases."""
        for layer in (self.linear_1, self.linear_2):
            layer.weight.normal_(0.0, scale, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


class LlavaModel(nn.Module):
    """The three parts, up to the Llama's last norm."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionModel(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = LlamaModel(config.text)

    def forward(
        self,
        input_ids: Tensor,
        layout: SequenceLayout | None = None,
        caches: list[KVCache] | None = None,
        images: Images | None = None,
    ) -> Tensor:
        hidden_BTD = self.language_model.embed_tokens(input_ids)
        if images is not None:
            hidden_BTD = put_features(hidden_BTD, self.image_features(images.pixel_values), images.positions)
        return self.language_model.run_embedded(hidden_BTD, layout, caches)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[I, C, S, S] → [I, P, D]."""
        states = self.vision_tower(pixel_values, self.config.feature_layers)
        features = torch.cat(states, dim=-1)
        return self.multi_modal_projector(features if self.config.keep_class_token else features[:, 1:])


class LlavaForConditionalGeneration(nn.Module):
    """A LLaVA with its language-model head."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.model = LlavaModel(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        layout: SequenceLayout | None = None,
        caches: list[KVCache] | None = None,
        images: Images | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm, for token ids [B, T] and the images that stand in them.

        `images` comes from `place_images`, with the config's `image_token` and `tokens_per_image`. Later steps of a
        generation, and rows without images, go without.
        """
        return self.model(input_ids, layout, caches, images)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] → [.., V]. For generation and losses of your own; `linear_cross_entropy` does without."""
        return self.lm_head(hidden)

    @property
    def language_model(self) -> LlamaForCausalLM:
        """The Llama in here with its head, for whatever takes a Llama (activation memory, streamed weights, the
        hand-written blocks).

        It shares its modules with this model, so what is done to its blocks is done here. Made anew each time: another
        `lm_head`, an adapted one say, must be put into this model. Its parameters' names lack `language_model.`.
        """
        return LlamaForCausalLM(self.config.text, self.model.language_model, self.lm_head)

    @property
    def vision_tower(self) -> CLIPVisionModel:
        return self.model.vision_tower

    @property
    def blocks(self) -> list[CLIPBlock | LlamaBlock]:
        """Of both towers; `vision_tower.blocks` and `language_model.blocks` are those of one."""
        return [*self.vision_tower.blocks, *self.model.language_model.layers]

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the config says so; call again after replacing either."""
        self.language_model.tie_weights()

    def make_caches(self, batch: int, slots: int) -> list[KVCache]:
        """Empty key/value caches, one per block of the Llama, for texts of up to `slots` tokens, images included."""
        return self.language_model.make_caches(batch, slots)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start from scratch: each tower as its family does, the projector as the Llama."""
        self.vision_tower.init_weights(generator)
        self.language_model.init_weights(generator)
        self.model.multi_modal_projector.init_weights(self.config.text.initializer_range, generator)

    # Where checkpoints keep these parameters: our prefix → theirs. A model without a checkpoint is saved in the first.
    _LLAMA_INSIDE = {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model."}
    _BARE = _LLAMA_INSIDE | {"model.multi_modal_projector.": "multi_modal_projector."}
    layouts = (
        _BARE | {"model.vision_tower.": "vision_tower."},  # transformers 5
        _BARE | {"model.vision_tower.": "vision_tower.vision_model."},  # the Hub
        {"model.vision_tower.": "model.vision_tower.vision_model."},  # transformers 4.5x
        {},  # a state dict of transformers 5, or ours
    )
    layout: dict[str, str] | None = None
    """The one that the weights were loaded from."""
    unread = ()
