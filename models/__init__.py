"""Models, one file each. `build_model` reads a config.json and builds the right one, without weights."""

import torch
from torch import nn

from models.llama import LlamaConfig, LlamaForCausalLM


def build_model(config: dict) -> nn.Module:
    """The model that a config.json describes, on the meta device: shapes, no memory. Weights come by `load_weights`."""
    architecture = (config.get("architectures") or [None])[0]
    if architecture is None and config.get("model_type") == "llama":
        architecture = "LlamaForCausalLM"
    if architecture != "LlamaForCausalLM":
        raise ValueError(f"architecture {architecture!r} in config.json is not supported; supported: LlamaForCausalLM")
    try:
        parsed = LlamaConfig.from_dict(config)
    except TypeError as error:
        raise ValueError(f"config.json has a value of the wrong type: {error}") from None
    with torch.device("meta"):
        return LlamaForCausalLM(parsed)
