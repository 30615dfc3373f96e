"""Rules that the flags of a training recipe must meet, checked before any file is read.

A rule stands with the part that it is about, such as modules/memory/step_in_backward.py, which checks it as well. Here
all of them are checked at once: what cannot work is refused now, not after minutes of downloading and tokenising.
Rules that need the model or the data stay where these are read.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from checkpointing.errors import say
from checkpointing.loggers import check_loggers
from checkpointing.run_folder import check_keep_last
from data.batches import check_batches, check_length, fit_seq_len
from data.chat.templates import check_chat_format
from data.dataset import room_behind
from data.tokenizers.new_tokens import read_tokens
from modules.adapters import whole_modules
from modules.adapters.lora import check_sizes
from modules.adapters.methods import check_options, find_method, read_by
from modules.adapters.options import Options
from modules.adapters.peft_names import read_pattern
from modules.adapters.vlm_parts import check_parts, fits_adapter
from modules.device import pick_device, pick_dtype
from modules.memory import step_in_backward
from modules.memory.activations import check_modes
from modules.memory.weight_streaming import ARE_FROZEN
from modules.optim import check_lr
from modules.quantization.quantize import check_head, linear_kind
from recipes.common import flags

TOPICS = (flags.TrainingFlags, flags.ImageFlags, flags.MethodFlags, flags.FusedFlags)
DEFAULTS = {field.name: field.default for topic in TOPICS for field in dataclasses.fields(topic)} | {"fused": False}
NOT_NEGATIVE = ("max_grad_norm", "warmup_steps", "weight_decay", "eval_every", "save_every")
NOT_NEGATIVE += ("activations_gib", "activations_host_gib", "freeze_layers")
FLOAT16 = "float16 cannot hold an Adam step of weights trained in full: use --dtype bfloat16 or float32"


def check_flags(cfg: Any) -> None:
    """Raise ValueError for flags that cannot work, OSError or ImportError for a data file or logger that is not there.

    `cfg`: a training recipe's Config. A flag that the recipe lacks counts as its default. For a flag that has no effect
    because of another one, a line is printed.
    """
    given, every = vars(cfg), SimpleNamespace(**DEFAULTS | vars(cfg))
    dtype = pick_dtype(every.dtype, pick_device(every.device))
    for name in NOT_NEGATIVE:
        if not (given.get(name) or 0) >= 0:
            raise ValueError(f"{shown(cfg, name)} must not be negative")
    fit_seq_len(every.seq_len, math.inf)
    check_batches(every.batch_size, every.grad_accum, every.image_workers)
    check_length(every.epochs, every.max_steps)
    check_lr(every.lr)
    if not every.alpha > 0:
        raise ValueError(f"{shown(cfg, 'alpha')} must be a positive number: it scales what the adapter adds")
    check_keep_last(every.keep_last)
    if not every.resume:  # a run that is finished needs its files and packages no more
        check_chat_format(every.chat_format)
        check_loggers(every)
        for path in (every.data, every.eval_data):
            if isinstance(path, Path):
                path.stat()
    if every.step_in_backward:
        step_in_backward.check(grad_accum=every.grad_accum, max_grad_norm=every.max_grad_norm, dtype=dtype)
    check_head(linear_kind(every.quantize), every.quantize_head)
    modes = (every.activations, every.activations_every, every.activations_gib, every.activations_host_gib)
    check_modes(*modes, fused=every.fused and not every.dropout, streaming=every.weights != "resident")
    if "method" in given:
        check_method(every)
    else:
        check_sizes(every.rank, every.dropout, every.targets)
    read_tokens(every.new_tokens)
    if every.modules_to_save:
        whole_modules.check_dtype(dtype)
    if "vision" in given:
        check_vision(every, dtype)
    if "init_projector" in given and dtype == torch.float16:
        raise ValueError(FLOAT16)
    if "master_weights" in given:
        check_trainable(given.get("trainable"), streamed=every.weights != "resident", frozen=given.get("freeze_layers"))
    say_ignored(cfg, every)


def check_method(cfg: Any) -> None:
    """Rules of peft_finetune.py."""
    method = find_method(cfg.method)
    check_options(cfg.method, options := method_options(cfg))
    if cfg.weights != "resident":
        if hasattr(method, "NEEDS_RESIDENT"):
            raise ValueError(method.NEEDS_RESIDENT)
        if hasattr(method, "NEEDS_DENSE"):
            raise ValueError(f"--method {cfg.method} begins with the dense weights: it needs --weights resident")
    if hasattr(method, "VIRTUAL_TOKENS") and (cfg.new_tokens or cfg.modules_to_save):
        what = "--new-tokens" if cfg.new_tokens else "--modules-to-save"
        raise ValueError(f"{what} does not go with --method {cfg.method}, whose adapter is one tensor in PEFT's format")
    if hasattr(method, "VIRTUAL_TOKENS") and not cfg.prompt_text:  # whose number may be the text's
        room_behind(options.num_virtual_tokens, cfg.seq_len)


def method_options(cfg: Any) -> Options:
    """A method's options as the flags give them. The recipe adds those from the tokenizer, the model and the data."""
    return Options(
        rank=cfg.rank,
        alpha=cfg.alpha,
        dropout=cfg.dropout,
        targets=cfg.targets,
        rank_pattern=read_pattern("--rank-pattern", cfg.rank_pattern, int),
        alpha_pattern=read_pattern("--alpha-pattern", cfg.alpha_pattern),
        num_virtual_tokens=Options.num_virtual_tokens if cfg.num_virtual_tokens is None else cfg.num_virtual_tokens,
        prompt_init=cfg.prompt_init,
        prompt_ids=(0,) if cfg.prompt_text else (),  # the tokens are not known yet
        prompt_encoder=cfg.prompt_encoder,
        encoder_size=cfg.encoder_size,
        quantize=linear_kind(cfg.quantize),
    )


def check_vision(cfg: Any, dtype: torch.dtype) -> None:
    """Rules of vlm_finetune.py."""
    how = parts_of(cfg)
    check_parts(how, quantize_head=cfg.quantize_head)
    if (cfg.modules_to_save or cfg.new_tokens) and not fits_adapter(how):
        raise ValueError("--modules-to-save and --new-tokens go with an adapter: not with a tower trained in full")
    if dtype == torch.float16 and "full" in how.values():
        raise ValueError(FLOAT16)
    if how["language"] == "full" and (cfg.embedding == "host" or cfg.weights != "resident"):
        raise ValueError("--embedding host and --weights stream are for frozen weights: not with --language full")
    given = [(part, rate) for part in how if (rate := getattr(cfg, f"{part}_lr", None)) is not None]
    if wrong := [f"--{part}-lr {rate}" for part, rate in given if not 0 <= rate < math.inf]:
        raise ValueError(f"{', '.join(wrong)} must be a positive number, or 0 to leave the part as it is")


def parts_of(cfg: Any) -> dict[str, str]:
    """How each part of a vision-language model is trained: frozen, lora or full."""
    return {part: getattr(cfg, part, "frozen") for part in ("vision", "projector", "language")}


def check_trainable(trainable: str | None, *, streamed: bool, frozen: int | None) -> None:
    """Rules of full_finetune.py and pretrain.py."""
    try:
        re.compile(trainable or "")
    except re.error as error:
        raise ValueError(f"--trainable {trainable!r} is not a regular expression: {error}") from None
    if streamed and not (frozen or trainable):
        raise ValueError(ARE_FROZEN)


def say_ignored(cfg: Any, every: SimpleNamespace) -> None:
    """Print a line for each flag that is not at its default and has no effect because of another one."""
    for names, why in ignored(cfg, every):
        for field in dataclasses.fields(cfg):
            # The default, written out, is no mistake: 20 virtual tokens.
            same = (field.default, getattr(Options, field.name, field.default))
            if field.name in names and getattr(cfg, field.name) not in same:
                say(f"note: {shown(cfg, field.name)} has no effect {why}")


def ignored(cfg: Any, every: SimpleNamespace) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of settings that do nothing in this run, and why."""
    if every.eval_data is None:
        yield ("eval_every",), "without --eval-data"
    if every.activations in ("none", "fast"):
        yield ("activations_every", "activations_gib"), f"with --activations {every.activations}"
    if hasattr(cfg, "method"):
        yield from ignored_by_method(every)
    if hasattr(cfg, "vision"):
        yield from ignored_by_parts(cfg)


def ignored_by_method(cfg: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    read, why = read_by(cfg.method), f"with --method {cfg.method}"
    some = {name for name in Options.__dataclass_fields__ if name in vars(cfg) and name not in ("dtype", "quantize")}
    yield tuple((some | {"prompt_text"}) - set(read)), why
    if "encoder_size" in read and "dropout" in read and cfg.prompt_encoder != "lstm":
        yield ("dropout",), f"{why} unless --prompt-encoder is lstm"
    if cfg.method == "prefix":
        if cfg.prompt_encoder:
            yield ("prompt_init", "prompt_text"), f"{why} --prompt-encoder {cfg.prompt_encoder}, which begins at random"
        else:
            yield ("encoder_size",), f"{why} unless there is a --prompt-encoder"
    if getattr(find_method(cfg.method), "VECTORS", False) and not (cfg.modules_to_save or cfg.new_tokens):
        yield ("weight_decay",), f"{why}, which trains vectors: only matrices decay"


def ignored_by_parts(cfg: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    how = parts_of(cfg)
    for part, choice in how.items():
        if choice == "frozen":
            yield (f"{part}_lr",), f"with --{part} frozen"
    if "lora" not in how.values():
        yield ("rank", "alpha", "dropout", "adapter_dtype"), f"unless one of {', '.join(f'--{p}' for p in how)} is lora"
    if how["language"] != "lora":
        yield ("targets",), f"with --language {how['language']}"
    if how["vision"] == how["language"] == "full":
        yield ("quantize",), "with --vision full and --language full: what is trained in full is not quantised"


def shown(cfg: Any, name: str) -> str:
    """A flag as on the command line."""
    value = getattr(cfg, name)
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
