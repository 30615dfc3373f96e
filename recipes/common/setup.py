"""The set-up that training recipes share. Each function reads a topic of flags, does one thing and says what it chose.

The loop is not here: it stands in each recipe, to be read and edited.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from checkpointing.errors import say
from checkpointing.pretrained import WeightFiles, load_weights
from data.batches import Batches, fit_seq_len
from data.chat.templates import ChatTemplate
from data.dataset import load_dataset
from data.tokenizers.load import Tokenizer
from modules.adapters.token_rows import train_token_rows
from modules.adapters.vlm_parts import name_in_language_model
from modules.adapters.vocabulary import grow_vocabulary
from modules.adapters.whole_modules import train_whole_modules
from modules.attention import choose_attention, describe_attention
from modules.compile import enable_compile
from modules.device import DTYPES, describe_device, make_deterministic, pick_device, pick_dtype
from modules.fused.blocks import choose_blocks
from modules.memory.activations import checkpoint_activations
from modules.memory.host_embedding import keep_embedding_on_host
from modules.memory.weight_streaming import StreamedWeights, stream_weights
from recipes.common.flags import AdapterFlags, DataFlags, MemoryFlags, ModelFlags


def prepare_device(flags: ModelFlags, seed: int) -> tuple[torch.device, torch.dtype]:
    """Where the run computes and in which precision; seeds everything random."""
    device = pick_device(flags.device)
    dtype = pick_dtype(flags.dtype, device)
    torch.manual_seed(seed)
    make_deterministic(flags.deterministic)
    enable_compile(flags.compile)
    names = ("quantize", "activations", "optimizer")
    choices = ", ".join(f"{name} {getattr(flags, name)}" for name in names if hasattr(flags, name))
    say(f"{describe_device(device, dtype)}; {choices}")
    return device, dtype


def open_data(
    flags: DataFlags,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config,
    device: torch.device,
    *,
    new_rows: Sequence[int] = (),
    **options,
) -> tuple[Batches, Batches | None]:
    """The training batches, and those of `--eval-data` if there are any, for a model of this config.

    `new_rows`: ids of tokens that the vocabulary will get. `options`: `load_dataset`'s; for images also ImageFlags.
    """
    if "image_processor" in options:
        options |= dict(image_root=flags.image_root, skip_bad_rows=flags.skip_bad_rows)
    rows = dict(
        seq_len=fit_seq_len(flags.seq_len, config.max_length),
        train_on=flags.train_on,
        prompt_field=flags.prompt_field,
        completion_field=flags.completion_field,
        on_special_content=flags.on_special_content,
        **options,
    )
    dataset = load_dataset(flags.data, tokenizer, template, **rows)
    eval_dataset = load_dataset(flags.eval_data, tokenizer, template, **rows) if flags.eval_data else None
    for loaded in filter(None, (dataset, eval_dataset)):
        loaded.check_vocabulary(max(config.vocab_size, *(row + 1 for row in (0, *new_rows))))
        for line in loaded.report.lines():
            say(line)
    # On CUDA, where each length may cost a compilation, lengths are few.
    common = dict(batch_size=flags.batch_size, pad_multiple=64 if device.type == "cuda" else 1)
    common |= dict(image_workers=getattr(flags, "image_workers", None))
    order = dict(grad_accum=flags.grad_accum, shuffle=flags.shuffle, seed=flags.seed)
    batches = Batches(dataset, packing=flags.packing, seq_len=rows["seq_len"], **order, **common)
    return batches, Batches(eval_dataset, **common) if eval_dataset else None


def load_base(
    flags: MemoryFlags,
    model: nn.Module,
    weights: WeightFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path,
) -> StreamedWeights | None:
    """Load a model's weights to where the flags want them; returns the streamed ones, if there are any.

    In a vision-language model `--embedding` and `--weights` concern the language model. `scratch`: the folder of the
    file that `--weights disk` streams from.
    """
    language = getattr(model, "language_model", model)
    if getattr(flags, "embedding", "resident") == "host":
        keep_embedding_on_host(language, device)
    streamed = None
    if flags.weights != "resident":
        streamed = stream_weights(language, device, folder=scratch if flags.weights == "disk" else None)
    if streamed is None:
        load_weights(model, weights, device=device, dtype=dtype)
        return None

    def placed(name: str) -> None:
        streamed.take(name if language is model else name_in_language_model(model, name))

    load_weights(model, weights, device=device, dtype=dtype, placed=placed)
    say(streamed.describe())
    return streamed


def add_token_rows(model: nn.Module, rows: list[int]) -> None:
    """Make the vocabulary long enough for these rows of new tokens; of a loaded model, before it gets adapters."""
    if rows:
        added = grow_vocabulary(model, max(rows) + 1)
        where = f"{added} rows were added, each the mean of the old ones" if added else "there was room for them"
        say(f"new tokens: rows {rows} are trained; {where}")


def train_beyond_adapters(flags: AdapterFlags, model: nn.Module, rows: list[int]) -> None:
    """Besides the adapters, train the modules of `--modules-to-save` and these rows of new tokens."""
    train_whole_modules(model, flags.modules_to_save)
    if flags.modules_to_save and getattr(model, "was_tied", False):
        say("the head and the embedding were one weight; they are two from now on")
    train_token_rows(model, rows, DTYPES[flags.adapter_dtype])


def choose_trainable(model: nn.Module, freeze_layers: int, pattern: str | None) -> None:
    """Freeze what is not to be trained; ValueError if nothing is left. A tied head is frozen with its embedding."""
    if not 0 <= freeze_layers <= len(model.blocks):
        raise ValueError(f"--freeze-layers {freeze_layers} must lie between 0 and {len(model.blocks)}")
    if freeze_layers:
        model.model.embed_tokens.requires_grad_(False)
        model.blocks[:freeze_layers].requires_grad_(False)
    if pattern is not None:
        wanted = re.compile(pattern)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and wanted.search(name) is not None)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"--freeze-layers {freeze_layers} and --trainable {pattern!r} leave nothing to train")


def pick_attention(flags: DataFlags, config, device: torch.device, dtype: torch.dtype, length: int) -> str:
    """The attention kernel for batches of these flags and rows of at most `length` tokens; a resumed run keeps it."""
    attention = "default"
    if not flags.packing:  # packed documents have one kernel
        attention = choose_attention(config, device, dtype, batch=flags.batch_size, length=length)
    say(describe_attention(device, dtype, flags.packing, attention))
    return attention


def run_blocks(
    flags: MemoryFlags,
    model: nn.Module,
    batches: Batches,
    *,
    device: torch.device,
    dtype: torch.dtype,
    streamed: StreamedWeights | None = None,
) -> dict:
    """Set how the blocks are run and what they keep for backward; returns the same as options of `plan_memory`."""
    bind = streamed.use if streamed else None
    fused = False
    if hasattr(flags, "fused"):
        first = next(batches.first(steps=1)).to(device, dtype) if flags.fused else None
        reason = choose_blocks(model, first, bind) if flags.fused else "--no-fused"
        say(f"blocks: plain modules ({reason})" if reason else "blocks: fused (modules/fused/lora_block.py)")
        fused = not reason
    options = dict(
        every=flags.activations_every,
        budget=flags.activations_gib * 2**30,
        host_budget=getattr(flags, "activations_host_gib", 0.0) * 2**30,
        fused=fused,
    )
    checkpoint_activations(model, flags.activations, **options, compile=flags.compile, bind=bind)
    options |= dict(optimizer=flags.optimizer, step_in_backward=flags.step_in_backward, streamed=streamed)
    return options | dict(grad_accum=flags.grad_accum)
