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

import torch
import tyro

from checkpointing.adapters import load_adapter
from checkpointing.errors import clear_errors
from checkpointing.pretrained import WeightFiles, find_checkpoint, load_weights, read_config
from data.chat_templates import load_chat_template, stop_token_ids
from data.tokenizers import load_tokenizer
from models import build_model
from modules.device import pick_device, pick_dtype
from modules.generation import generate


@dataclass
class Config:
    model: str
    """Checkpoint folder or Hub id."""
    prompt: str
    """What to complete, or to answer."""
    adapter: Path | None = None
    """LoRA adapter folder in PEFT's format."""
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
    quantize: Literal["none", "nf4"] = "none"
    """Keep the linear layers of the blocks in 4 bits."""
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
    model = build_model(read_config(folder))
    tokenizer = load_tokenizer(folder)
    template = None if cfg.raw else load_chat_template(folder, tokenizer, cfg.chat_format, extra_folder=cfg.adapter)
    if cfg.quantize == "nf4":
        from modules.nf4 import quantize_nf4  # torchao takes seconds to import

        quantize_nf4(model)
    load_weights(model, WeightFiles(folder), device=device, dtype=pick_dtype(cfg.dtype, device))
    if cfg.adapter:
        load_adapter(model, cfg.adapter)

    if template is None:
        if cfg.system:
            raise ValueError("--system needs a chat template: this prompt is continued as plain text")
        if not cfg.raw:
            print("no chat template: continuing the prompt as plain text", file=sys.stderr)
        prompt = tokenizer.encode_prompt(cfg.prompt)
    else:
        messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
        messages.append({"role": "user", "content": cfg.prompt})
        prompt = tokenizer.encode(template.render(messages, add_generation_prompt=True))
    (completion,) = generate(
        model.eval(),
        [prompt],
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        stop_ids=stop_token_ids(folder, tokenizer, template),
        generator=torch.Generator(device).manual_seed(cfg.seed),
    )
    print(tokenizer.decode(completion))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
