"""Models, one file each. `build_model` reads a config.json and builds the right one, without weights."""

import torch
from torch import nn

from models.clip_vit import CLIPVisionConfig, CLIPVisionModel
from models.llama import LlamaConfig, LlamaForCausalLM
from models.llava import LlavaConfig, LlavaForConditionalGeneration
from models.smolvlm import SmolVLMConfig, SmolVLMForConditionalGeneration
from models.vision_language import VisionLanguageModel

# architecture: (config, model, model_type). A new model is one line here. A config.json may name only its model_type.
MODELS = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM, "llama"),
    "LlavaForConditionalGeneration": (LlavaConfig, LlavaForConditionalGeneration, "llava"),
    "Idefics3ForConditionalGeneration": (SmolVLMConfig, SmolVLMForConditionalGeneration, "idefics3"),
    "SmolVLMForConditionalGeneration": (SmolVLMConfig, SmolVLMForConditionalGeneration, "smolvlm"),
    "CLIPVisionModel": (CLIPVisionConfig, CLIPVisionModel, "clip_vision_model"),
    "CLIPModel": (CLIPVisionConfig, CLIPVisionModel, "clip"),  # its vision half
}


def build_model(config: dict) -> nn.Module:
    """The model that a config.json describes, on the meta device: shapes, no memory. Weights come by `load_weights`."""
    by_type = {model_type: architecture for architecture, (_, _, model_type) in MODELS.items()}
    architecture = (config.get("architectures") or [by_type.get(config.get("model_type"))])[0]
    if architecture not in MODELS:
        named = f"architecture {architecture!r}" if architecture else f"model_type {config.get('model_type')!r}"
        raise ValueError(f"{named} in config.json is not supported; supported: {', '.join(MODELS)}")
    config_class, model_class, _ = MODELS[architecture]
    if architecture == "CLIPModel":  # the first CLIP folders hold changes to vision_config beside it
        config = (config.get("vision_config") or {}) | (config.get("vision_config_dict") or {})
    try:
        with torch.device("meta"):
            return model_class(config_class.from_dict(config))
    except TypeError as error:
        raise ValueError(f"config.json has a value of the wrong type: {error}") from None


def build_text_model(config: dict) -> LlamaForCausalLM:
    """The same, where only a language model will do."""
    model = build_model(config)
    if not isinstance(model, LlamaForCausalLM):
        fix = "this recipe trains language models; vlm_finetune.py trains those with images"
        raise ValueError(f"--model is a {type(model).__name__}; {fix}")
    return model


def build_vision_language_model(config: dict) -> VisionLanguageModel:
    """The same, where it must be a model that takes images."""
    model = build_model(config)
    if not isinstance(model, VisionLanguageModel):
        raise ValueError(f"--model is a {type(model).__name__}, which takes no images: this needs a LLaVA or SmolVLM")
    return model
