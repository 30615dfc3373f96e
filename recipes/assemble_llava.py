"""Put a LLaVA together from its two published parts, a CLIP and a Llama.

    python recipes/assemble_llava.py --vision-tower openai/clip-vit-large-patch14-336 \
        --language-model lmsys/vicuna-7b-v1.5 --output LLAVA
    python recipes/vlm_pretrain_projector.py --model LLAVA --data captions.jsonl --output runs/projector

As LLaVA-1.5 is made (arXiv:2310.03744): the vision tower's last layer but one is read without its class token, the
projector between is random, the tokenizer gets <image>, and <pad> if it has none, with rows that are the mean of the
others. The result opens in transformers; it sees nothing yet, which is what the second command is for.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors, say  # isort: split

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from checkpointing.atomic import atomic_folder, check_vacant
from checkpointing.export import check_export, write_companions, write_weights
from checkpointing.pretrained import WeightFiles, check_names, find_checkpoint, on_disk, read_config
from checkpointing.safetensors_file import spec_bytes
from data.chat.contents import PLACEHOLDER
from data.chat.formats import TEMPLATES
from data.chat.templates import load_chat_template
from data.images.load import load_image_processor, read_processor
from data.tokenizers.load import Tokenizer, load_tokenizer
from data.tokenizers.new_tokens import add_tokens, save_tokenizer
from models import build_model
from models.clip_vit import CLIPVisionModel
from models.llama import LlamaForCausalLM
from models.vision_language import VisionLanguageModel
from modules.adapters.vlm_parts import name_in_language_model
from modules.device import DTYPES

PAD = "<pad>"
ROWS = 64  # the vocabulary is filled up to a multiple of this


@dataclass
class Config:
    vision_tower: str
    """Folder or Hub id of a CLIPVisionModel, or of a CLIPModel, whose other half stays behind."""
    language_model: str
    """Folder or Hub id of a Llama; one that has learnt to chat is a good beginning."""
    output: Path
    """Folder for the LLaVA."""
    feature_layer: int = -2
    """The vision tower's layer that is read; -1 is the last one."""
    select: Literal["default", "full"] = "default"
    """full: the class token is read, too."""
    chat_format: str = "auto"
    """Chat template: auto (the Llama's own; LLaVA's if it has none), llava, llama3, chatml or a .jinja file."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the written weights; auto: the Llama's."""
    seed: int = 0
    """Seed of the projector's weights."""


def main(cfg: Config) -> None:
    check_vacant(cfg.output)
    vision_folder, text_folder = find_checkpoint(cfg.vision_tower), find_checkpoint(cfg.language_model)
    vision_config, text_config = read_config(vision_folder), read_config(text_folder)
    vision, text = build_model(vision_config), build_model(text_config)  # for their names
    for flag, folder, model, kind in (
        ("--vision-tower", vision_folder, vision, CLIPVisionModel),
        ("--language-model", text_folder, text, LlamaForCausalLM),
    ):
        if not isinstance(model, kind):
            raise ValueError(f"{flag} {folder} holds a {type(model).__name__}, expected a {kind.__name__}")

    # The tokenizer, and as many rows as it needs.
    tokenizer, template, pad_id = tokenizer_with_image(text_folder, cfg.chat_format)
    image_token = tokenizer.special_tokens[PLACEHOLDER]
    vocab_size = max(text.config.vocab_size, -(-tokenizer.vocab_size // ROWS) * ROWS)

    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": cfg.feature_layer,
        "vision_feature_select_strategy": cfg.select,
        "tie_word_embeddings": text.config.tie_word_embeddings,
        "text_config": text_config | {"vocab_size": vocab_size, "pad_token_id": pad_id},
        "vision_config": vision_config.get("vision_config", vision_config) | {"model_type": "clip_vision_model"},
    }
    model = build_model(config)
    config["image_seq_length"] = model.config.tokens_per_image

    # Where each of its tensors comes from.
    generator = torch.Generator().manual_seed(cfg.seed)
    projector = model.projector.to_empty(device="cpu")
    projector.init_weights(model.config.text.initializer_range, generator)
    vision_weights, text_weights = WeightFiles(vision_folder), WeightFiles(text_folder)
    vision_names, text_names = check_names(vision, vision_weights), check_names(text, text_weights)

    def read(name: str) -> Tensor:
        part = model.part_of(name)
        if part == "projector":
            return model.get_parameter(name).detach()
        if part == "vision":
            return vision_weights.read(on_disk(name.removeprefix(f"{model.parts['vision']}."), vision_names))
        tensor = text_weights.read(on_disk(name_in_language_model(model, name), text_names))
        rows = model.get_parameter(name).shape[0] - tensor.shape[0]
        if not rows:
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(rows, -1)])

    names = [name for name, _ in model.named_parameters()]  # a tied head is the embedding
    first = text_weights.read(text_weights.names()[0])
    dtype = first.dtype if cfg.dtype == "auto" else DTYPES[cfg.dtype]
    ours = {on_disk(name, model.names_on_disk[0]): name for name in names}
    specs = [(file, tuple(model.get_parameter(name).shape), dtype) for file, name in ours.items()]
    cfg.output.parent.mkdir(parents=True, exist_ok=True)
    check_export(cfg.output.parent, sum(spec_bytes(spec) for spec in specs))
    with atomic_folder(cfg.output) as target, tqdm(total=len(specs), unit="tensor", disable=None) as bar:

        def stored(file: str) -> Tensor:
            bar.update()
            return read(ours[file]).to(dtype)

        write_weights(target, specs, stored)
        write_companions(target, config, text_folder, dtype=dtype, chat_template=template)
        save_tokenizer(target, tokenizer, text_folder)
        write_processor(target, vision_folder, model, config)
    say(f"{cfg.output}: {PLACEHOLDER} is token {image_token}, an image takes {config['image_seq_length']} of them")


def tokenizer_with_image(folder: Path, chat_format: str) -> tuple[Tokenizer, str, int]:
    """The Llama's tokenizer with <image> and a padding token, a chat template for it, and the padding token's id."""
    tokenizer = load_tokenizer(folder)
    own = load_chat_template(folder, tokenizer, "own" if chat_format == "auto" else chat_format)
    new = [PLACEHOLDER] if tokenizer.pad_id is not None else [PLACEHOLDER, PAD]
    longer, _ = add_tokens(tokenizer, new, tokenizer.vocab_size)
    if longer.pad_id is None:
        longer.pad_id = longer.special_tokens[PAD]
    if own is None and tokenizer.adds_bos:  # as LLaVA's own folders have it: the tokenizer begins the text, once
        return longer, TEMPLATES["llava"].replace("{{ bos_token }}", ""), longer.pad_id
    return longer, own.source if own else TEMPLATES["llava"], longer.pad_id


def write_processor(folder: Path, vision_folder: Path, model: VisionLanguageModel, config: dict) -> None:
    """CLIP's image processor, and what transformers' LlavaProcessor needs to know besides."""
    _, images = read_processor(vision_folder)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": PLACEHOLDER,
        "patch_size": model.config.vision.patch_size,
        "num_additional_image_tokens": 1,  # CLIP's class token
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    for name, content in (("preprocessor_config.json", images), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    load_image_processor(folder, config)  # it must make images of the size that the tower takes


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
