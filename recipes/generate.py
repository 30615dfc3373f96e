"""Print a completion of a prompt.

    python recipes/generate.py --model meta-llama/Llama-3.2-1B-Instruct --prompt "Why is the sky blue?"
    python recipes/generate.py --model BASE --adapter runs/lora/adapter --prompt "Why is the sky blue?"

The prompt is put into the checkpoint's chat template if it has one; with --raw it is the text behind the tokenizer's
own BOS, as prompt/completion rows are trained. Only the completion goes to standard output.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors  # isort: split

import torch
import tyro

from checkpointing.adapters import load_adapter
from checkpointing.pretrained import WeightFiles, find_checkpoint, load_weights, read_config
from data.chat.templates import load_chat_template, stop_token_ids
from data.images.files import check, load_image
from data.images.load import load_image_processor
from data.tokenizers.load import load_tokenizer
from data.tokenizers.new_tokens import tokenizer_folder
from models import build_model
from models.vision_language import VisionLanguageModel
from modules.device import pick_device, pick_dtype
from modules.generation import generate
from modules.image_tokens import place_images
from modules.quantization.quantize import linear_kind, quantize_blocks


@dataclass
class Config:
    model: str
    """Checkpoint folder or Hub id."""
    prompt: str
    """What to complete, or to answer."""
    image: tuple[Path, ...] = ()
    """Images for a model that sees; with --raw, <image> in the prompt says where they stand, else they stand first."""
    adapter: Path | None = None
    """Adapter folder in PEFT's format."""
    system: str | None = None
    """System message, with a chat template."""
    raw: bool = False
    """No chat template: continue the text."""
    chat_format: str = "own"
    """Chat template: own (adapter's or checkpoint's; none: as --raw), llama2, llama3, chatml, vicuna, FILE.jinja."""
    max_new_tokens: int = 256
    """Longest completion."""
    temperature: float = 0.0
    """0 is greedy."""
    quantize: Literal["none", "nf4", "int8", "int4", "float8"] = "none"
    """Keep the linear layers of the blocks in 4 or 8 bits."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of weights and activations."""


def main(cfg: Config) -> None:
    if cfg.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} must be at least 1")
    if cfg.temperature < 0:
        raise ValueError(f"--temperature {cfg.temperature} is negative; 0 is greedy")
    device = pick_device(cfg.device)
    folder = find_checkpoint(cfg.model)
    config = read_config(folder)
    model = build_model(config)
    sees = isinstance(model, VisionLanguageModel)
    if cfg.image and not sees:
        raise ValueError(f"--image: {cfg.model} is a {type(model).__name__}, which sees nothing")
    tokenizer = load_tokenizer(tokenizer_folder(folder, cfg.adapter))
    template = None if cfg.raw else load_chat_template(folder, tokenizer, cfg.chat_format, extra_folder=cfg.adapter)
    quantize_blocks(model, linear_kind(cfg.quantize))
    load_weights(model, WeightFiles(folder), device=device, dtype=pick_dtype(cfg.dtype, device))
    if cfg.adapter:
        load_adapter(model, cfg.adapter)

    if template is None:
        if cfg.system:
            raise ValueError("--system needs a chat template: this prompt is continued as plain text")
        if not cfg.raw:
            print("no chat template: continuing the prompt as plain text", file=sys.stderr)
        placed = "" if "<image>" in cfg.prompt else "<image>\n" * len(cfg.image)
        prompt = tokenizer.encode_prompt(placed + cfg.prompt)
    else:
        messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
        parts = [*[{"type": "image"} for _ in cfg.image], {"type": "text", "text": cfg.prompt}]
        messages.append({"role": "user", "content": parts if cfg.image else cfg.prompt})
        text = template.render(messages, add_generation_prompt=True)
        # The processor of a model that sees adds BOS where the template wrote none; a tokenizer takes it as it is.
        prompt = tokenizer.encode_prompt(text) if sees else tokenizer.encode(text)
    images = None
    if sees:
        processor = load_image_processor(folder, config)
        pixels = torch.cat([load_image(path, processor) for path in cfg.image]) if cfg.image else None
        prompt, _ = processor.expand(prompt, cfg.image, lambda path: check(path, processor), tokenizer)
        sizes = dict(image_token=processor.token_id, tokens_per_image=processor.tokens)
        images = place_images([prompt], pixels, **sizes)
    (completion,) = generate(
        model.eval(),
        [prompt],
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        stop_ids=stop_token_ids(folder, tokenizer, template),
        generator=torch.Generator(device).manual_seed(cfg.seed),
        images=images,
    )
    print(tokenizer.decode(completion))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
