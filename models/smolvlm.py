"""SmolVLM (arXiv:2504.05299) and Idefics3 (arXiv:2408.12637): a SigLIP vision transformer, a connector, and a Llama.

An image is shown as several square tiles and once in full (data/images/tiles.py); to the model each of these is an
image. The connector folds s × s neighbouring patches into one feature and projects it to the Llama's width: 1,024
patches of a 512-pixel tile become 64 tokens. models/vision_language.py runs the parts. Module names are transformers'.

D width of the Llama, I images (tiles), C channels, S image size, P patches (H rows, W columns), s scale factor.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.llama import PRESETS as LLAMA_PRESETS
from models.llama import LlamaConfig, LlamaModel
from models.siglip_vit import SiglipVisionConfig, SiglipVisionModel
from models.vision_language import VisionLanguageConfig, VisionLanguageModel, sections


@dataclass(frozen=True)
class SmolVLMConfig(VisionLanguageConfig):
    scale_factor: int = 2
    """s: so many patches in either direction become one feature."""

    @classmethod
    def from_dict(cls, config: dict) -> "SmolVLMConfig":
        """From a config.json. Raises ValueError for settings that this file does not implement."""
        text_config, vision_config = sections(config, "SmolVLM")
        # These models say outside of text_config whether the head is the embedding.
        tied = config.get("tie_word_embeddings") or False
        text = replace(LlamaConfig.from_dict(text_config), tie_word_embeddings=tied)
        vision = SiglipVisionConfig.from_dict(vision_config)
        image_token, scale_factor = config.get("image_token_id", 128257), config.get("scale_factor", 2)
        if not 0 <= image_token < text.vocab_size:
            raise ValueError(f"image_token_id {image_token} in config.json has no row in {text.vocab_size} tokens")
        if scale_factor < 1 or vision.side % scale_factor:
            raise ValueError(
                f"scale_factor {scale_factor} in config.json must divide the {vision.side} rows of patches"
            )
        return cls(text, vision, image_token, scale_factor)

    @property
    def tokens_per_image(self) -> int:
        """Of an image as large as `image_size`, which is what the processors of all known checkpoints make."""
        return (self.vision.side // self.scale_factor) ** 2


_SIGLIP_BASE = {"hidden_size": 768, "image_size": 512, "patch_size": 16, "num_attention_heads": 12}
_SIGLIP_SO400M = {"image_size": 384, "patch_size": 14, "intermediate_size": 4304, "num_hidden_layers": 27}
_SMALL = {"vocab_size": 49280, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5}
_135M = LLAMA_PRESETS["smollm2-135m"] | _SMALL
_360M = _135M | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
_360M |= {"num_attention_heads": 15, "num_key_value_heads": 5}
_1_7B = {"vocab_size": 49155, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 273768.0}
_1_7B |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
PRESETS: dict[str, dict] = {  # as in each checkpoint's config.json
    "smolvlm-256m": {"vision_config": _SIGLIP_BASE, "text_config": _135M, "image_token_id": 49190, "scale_factor": 4},
    "smolvlm-500m": {"vision_config": _SIGLIP_BASE, "text_config": _360M, "image_token_id": 49190, "scale_factor": 4},
    "smolvlm-2.2b": {"vision_config": _SIGLIP_SO400M, "text_config": _1_7B, "image_token_id": 49153, "scale_factor": 3},
}


class Connector(nn.Module):
    """s × s neighbouring patches side by side, projected: [I, P, width of the vision tower] → [I, P / s², D]."""

    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.scale_factor = config.scale_factor
        self.modality_projection = nn.Module()  # transformers' names: one layer, two levels down
        width = config.vision.hidden_size * config.scale_factor**2
        self.modality_projection.proj = nn.Linear(width, config.text.hidden_size, bias=False)

    def forward(self, patches: Tensor, rows: int) -> Tensor:
        I, P, width = patches.shape  # noqa: E741
        s, columns = self.scale_factor, P // rows
        blocks = patches.view(I, rows // s, s, columns // s, s, width).transpose(2, 3)  # [I, H/s, W/s, s, s, width]
        return self.modality_projection.proj(blocks.reshape(I, P // s**2, s**2 * width))

    @torch.no_grad()
    def init_weights(self, scale: float, generator: torch.Generator | None = None) -> None:
        """N(0, scale)."""
        self.modality_projection.proj.weight.normal_(0.0, scale, generator=generator)


class SmolVLMModel(nn.Module):
    """The three parts."""

    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionModel(config.vision)
        self.connector = Connector(config)
        self.text_model = LlamaModel(config.text)

    def image_features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """[I, C, S, S'] → [I, P / s², D].

        `pixel_mask` [I, S, S'] is False for padding; a patch counts if one of its pixels does. Full tiles need none.
        """
        patch, s = self.config.vision.patch_size, self.config.scale_factor
        rows, columns = (side // patch for side in pixel_values.shape[2:])
        if rows % s or columns % s:
            raise ValueError(f"{rows} × {columns} patches cannot be folded {s} × {s}; a tile's sides must be multiples")
        patch_mask = None
        if pixel_mask is not None:
            cells = pixel_mask[:, : rows * patch, : columns * patch].unflatten(2, (columns, patch))
            patch_mask = cells.unflatten(1, (rows, patch)).bool().any(dim=4).any(dim=2)
        return self.connector(self.vision_model(pixel_values, patch_mask), rows)


class SmolVLMForConditionalGeneration(VisionLanguageModel):
    """A SmolVLM or Idefics3 with its language-model head; how it is run stands in models/vision_language.py."""

    parts = {"vision": "model.vision_model", "projector": "model.connector", "language": "model.text_model"}

    def __init__(self, config: SmolVLMConfig):
        super().__init__(config, SmolVLMModel(config))
