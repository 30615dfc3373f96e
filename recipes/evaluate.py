"""Loss and perplexity of a model, with or without an adapter, on a data file: one JSON object on standard output.

    python recipes/evaluate.py --model BASE --adapter runs/lora/adapter --data test.jsonl

prints {"loss": …, "perplexity": …, "tokens": …}. The loss is the mean over all target tokens of the file; rows are
never cut, and no logits are kept.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors  # isort: split

import tyro
from tqdm import tqdm

from checkpointing.adapters import count_virtual_tokens, load_adapter
from checkpointing.pretrained import WeightFiles, find_checkpoint, load_weights, read_config
from checkpointing.run_record import to_json
from data.batches import Batches
from data.chat.templates import load_chat_template
from data.dataset import load_dataset
from data.images.load import load_image_processor
from data.tokenizers.load import load_tokenizer
from data.tokenizers.new_tokens import tokenizer_folder
from models import build_model
from models.vision_language import VisionLanguageModel
from modules.adapters.virtual_tokens import placeholders
from modules.device import pick_device, pick_dtype
from modules.evaluation import evaluate_loss
from modules.quantization.quantize import linear_kind, quantize_blocks


@dataclass
class Config:
    model: str
    """Checkpoint folder or Hub id."""
    data: Path
    """Rows in any of the training formats."""
    adapter: Path | None = None
    """Adapter folder in PEFT's format."""
    image_root: Path | None = None
    """Folder that image files are named relative to; default: the data file's."""
    prompt_field: str | None = None
    """Column to use as the prompt, with --completion-field."""
    completion_field: str | None = None
    """Column to use as the completion, with --prompt-field."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens count, as in training."""
    chat_format: str = "auto"
    """Chat template: auto (the adapter's or checkpoint's own), llama2, llama3, chatml, vicuna or a .jinja file."""
    batch_size: int = 1
    """Rows per forward pass."""
    quantize: Literal["none", "nf4", "int8", "int4", "float8"] = "none"
    """Keep the linear layers of the blocks in 4 or 8 bits."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of weights and activations."""


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    folder = find_checkpoint(cfg.model)
    config = read_config(folder)
    model = build_model(config)
    sees = isinstance(model, VisionLanguageModel)
    tokenizer = load_tokenizer(tokenizer_folder(folder, cfg.adapter))
    dataset = load_dataset(
        cfg.data,
        tokenizer,
        load_chat_template(folder, tokenizer, cfg.chat_format, extra_folder=cfg.adapter),
        seq_len=None,
        train_on=cfg.train_on,
        prompt_field=cfg.prompt_field,
        completion_field=cfg.completion_field,
        image_processor=load_image_processor(folder, config) if sees else None,
        image_root=cfg.image_root,
        virtual_ids=placeholders(count_virtual_tokens(cfg.adapter)),
    )
    for line in dataset.report.lines():
        print(line, file=sys.stderr)
    if (longest := int(max(dataset.lengths))) > model.config.max_length:
        raise ValueError(f"{cfg.data} has a row of {longest} tokens; the model takes {model.config.max_length} at most")
    quantize_blocks(model, linear_kind(cfg.quantize))
    load_weights(model, WeightFiles(folder), device=device, dtype=dtype)
    if cfg.adapter:
        load_adapter(model, cfg.adapter)
    dataset.check_vocabulary(model.config.vocab_size)
    batches = Batches(dataset, batch_size=cfg.batch_size)
    progress = tqdm(batches.one_epoch(), total=len(batches.plan(0)), unit="batch", disable=None)
    loss, tokens = evaluate_loss(model, progress, device, dtype)
    # beyond e^700 a float overflows; such a model knows nothing anyway
    perplexity = float("inf") if loss > 700 else math.exp(loss)
    print(json.dumps(to_json({"loss": loss, "perplexity": perplexity, "tokens": tokens})))  # JSON has no NaN


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
