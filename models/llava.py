"""LLaVA (arXiv:2304.08485, arXiv:2310.03744): a CLIP vision transformer, a projector of two layers, and a Llama.

The output of one of the vision tower's last layers is projected to the Llama's width and takes the place of the image
tokens in the embedded sequence. The rest is the Llama of models/llama.py. Module names are those that transformers has
in memory; what folders call the same tensors stands at the end.

B batch, T tokens, D width of the Llama, I images, C channels, S image size, P patches (one more with the class token).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.clip_vit import PRESETS as CLIP_PRESETS
from models.clip_vit import CLIPVisionConfig, CLIPVisionModel
from models.llama import LlamaConfig, LlamaModel
from models.vision_language import VisionLanguageConfig, VisionLanguageModel, sections
from modules.feed_forward import ACTIVATIONS


@dataclass(frozen=True)
class LlavaConfig(VisionLanguageConfig):
    feature_layers: tuple[int, ...]  # layers of the vision tower whose hidden states are projected, side by side
    keep_class_token: bool
    """Whether the class token is a feature, too (`vision_feature_select_strategy` "full")."""
    projector_act: str = "gelu"
    projector_bias: bool = True

    @classmethod
    def from_dict(cls, config: dict) -> "LlavaConfig":
        """From a config.json. Raises ValueError for settings that this file does not implement."""
        text_config, vision_config = sections(config, "LLaVA")
        if config.get("tie_word_embeddings"):  # old folders say it here
            text_config["tie_word_embeddings"] = True
        text, vision = LlamaConfig.from_dict(text_config), CLIPVisionConfig.from_dict(vision_config)
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
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"projector_hidden_act {activation!r} in config.json is not one of {names}")
        image_token = config.get("image_token_index", config.get("image_token_id", 32000))
        if not 0 <= image_token < text.vocab_size:
            raise ValueError(f"image_token_index {image_token} in config.json has no row in {text.vocab_size} tokens")
        bias = config.get("multimodal_projector_bias", True)
        return cls(text, vision, image_token, layers, selection == "full", activation, bias)

    @property
    def tokens_per_image(self) -> int:
        return self.vision.patches + self.keep_class_token


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
    """The three parts."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionModel(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = LlamaModel(config.text)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[I, C, S, S] → [I, P, D]."""
        states = self.vision_tower(pixel_values, self.config.feature_layers)
        features = torch.cat(states, dim=-1)
        return self.multi_modal_projector(features if self.config.keep_class_token else features[:, 1:])


class LlavaForConditionalGeneration(VisionLanguageModel):
    """A LLaVA with its language-model head; how it is run stands in models/vision_language.py."""

    parts = {
        "vision": "model.vision_tower",
        "projector": "model.multi_modal_projector",
        "language": "model.language_model",
    }

    def __init__(self, config: LlavaConfig):
        super().__init__(config, LlavaModel(config))

    # What checkpoints call these parameters: our prefix → theirs. A model without a checkpoint is saved as the first.
    _LLAMA_INSIDE = {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model."}
    _BARE = _LLAMA_INSIDE | {"model.multi_modal_projector.": "multi_modal_projector."}
    names_on_disk = (
        _BARE | {"model.vision_tower.": "vision_tower."},  # transformers 5
        _BARE | {"model.vision_tower.": "vision_tower.vision_model."},  # the Hub
        {"model.vision_tower.": "model.vision_tower.vision_model."},  # transformers 4.5x
        {},  # a state dict of transformers 5, or ours
    )
