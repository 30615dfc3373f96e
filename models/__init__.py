"""Models, one file each. `build_model` reads a config.json and builds the right one, without weights."""

import torch
from torch import nn

from models.clip_vit import CLIPVisionConfig, CLIPVisionModel
from models.llama import LlamaConfig, LlamaForCausalLM
from models.llava import LlavaConfig, LlavaForConditionalGeneration
from models.smolvlm import SmolVLMConfig, SmolVLMForConditionalGeneration

# Where a config.json names no architecture, its model_type does.
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "clip_vision_model": "CLIPVisionModel",
    "clip": "CLIPModel",
}


def build_model(config: dict) -> nn.Module:
    """The model that a config.json describes, on the meta device: shapes, no memory. Weights come by `load_weights`.

    Of a CLIPModel this is the vision half.
    """
    architecture = (config.get("architectures") or [_BY_MODEL_TYPE.get(config.get("model_type"))])[0]
    try:
        with torch.device("meta"):
            match architecture:
                case "LlamaForCausalLM":
                    return LlamaForCausalLM(LlamaConfig.from_dict(config))
                case "LlavaForConditionalGeneration":
                    return LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
                case "Idefics3ForConditionalGeneration" | "SmolVLMForConditionalGeneration":
                    return SmolVLMForConditionalGeneration(SmolVLMConfig.from_dict(config))
                case "CLIPVisionModel":
                    return CLIPVisionModel(CLIPVisionConfig.from_dict(config))
                case "CLIPModel":  # the first CLIP folders hold changes to vision_config beside it
                    vision = (config.get("vision_config") or {}) | (config.get("vision_config_dict") or {})
                    return CLIPVisionModel(CLIPVisionConfig.from_dict(vision))
    except TypeError as error:
        raise ValueError(f"config.json has a value of the wrong type: {error}") from None
    supported = ", ".join(_BY_MODEL_TYPE.values())
    raise ValueError(f"architecture {architecture!r} in config.json is not supported; supported: {supported}")


def build_text_model(config: dict) -> LlamaForCausalLM:
    """The same, where only a language model will do."""
    model = build_model(config)
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(
            f"--model is a {type(model).__name__}, and this recipe trains language models; one that sees is trained by "
            "vlm_finetune.py"
        )
    return model
