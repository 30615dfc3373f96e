"""Tiny checkpoints, written by transformers, and data files: what the recipes' tests run on."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checkpointing.errors import clear_errors

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)


def test_data() -> Path:
    """The folder of real tokenizers and data that HANDTUNE_TEST_DATA names; the test is skipped where it is unset."""
    folder = os.environ.get("HANDTUNE_TEST_DATA")
    if not folder:
        pytest.skip("HANDTUNE_TEST_DATA is unset: no real tokenizers and data to test with")
    return Path(folder)


test_data.__test__ = False


def make_checkpoint(folder: Path, *, seed: int = 0, chat_template: str | None = None, scale: float = 0.08, **overrides):
    """A random Llama and a byte-level tokenizer as transformers saves them; returns the transformers model."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox has 12 apples and 7 pears, how many are left? " * 30], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = SHAPE | dict(vocab_size=len(fast), bos_token_id=0, eos_token_id=1) | overrides
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, scale)
    model.save_pretrained(folder)
    return model


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int) -> list[dict]:
    """Prompt/completion rows of unequal length."""
    return [
        {"prompt": f"{i} + {i * j} =" + " please" * (i % 5), "completion": f" {i + i * j}" + "!" * (i % 7)}
        for i, j in ((i, i % 3 + 1) for i in range(count))
    ]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def run_recipe(name: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    """A recipe with a command line's arguments, in this process (starting one takes seconds)."""
    recipe = importlib.import_module(f"recipes.{name}")
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            with clear_errors():
                recipe.main(tyro.cli(recipe.Config, args=[str(argument) for argument in arguments]))
        except SystemExit as stop:
            code = stop.code or 0
    if check and code:
        raise AssertionError(f"{name} ended with {code}:\n{stderr.getvalue()}")
    return subprocess.CompletedProcess([name, *arguments], code, stdout.getvalue(), stderr.getvalue())


def start_recipe(name: str, *arguments) -> subprocess.Popen:
    """A recipe as a user starts it, in a process of its own."""
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
