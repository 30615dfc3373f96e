"""What a training recipe's flags say about each other, found out before any file is read.

A rule stands with the part that it is about (step_in_backward.py, say), which asks it, too. Here all of them
are asked at once, for flags alone: what cannot work is refused now, not after minutes of downloading, tokenising and
loading. What depends on the model or the data stays where they are read.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
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
from modules.adapters.vlm_parts import check_parts
from modules.device import pick_device, pick_dtype
from modules.memory import step_in_backward
from modules.memory.activations import NEEDS_HAND_WRITTEN
from modules.memory.weight_streaming import ARE_FROZEN, NEEDS_RECOMPUTATION
from modules.optim import check_lr
from modules.quantization.quantize import check_head, linear_kind

NOT_NEGATIVE = ("max_grad_norm", "warmup_steps", "weight_decay", "eval_every", "save_every")
NOT_NEGATIVE += ("activations_gib", "activations_host_gib", "freeze_layers")
FLOAT16 = "float16 cannot hold an Adam step of weights trained in full: use --dtype bfloat16 or float32"


def check_flags(cfg: Any) -> None:
    """Raise ValueError for flags that cannot work, OSError or ImportError for a data file or logger that is not there.

    `cfg`: a training recipe's Config. Flags that not all recipes have are asked about where they are there. A flag that
    another one leaves without effect is no error; it gets a line.
    """
    flags = vars(cfg)
    dtype = pick_dtype(cfg.dtype, pick_device(cfg.device))
    for name in NOT_NEGATIVE:
        if not (flags.get(name) or 0) >= 0:
            raise ValueError(f"{shown(cfg, name)} must not be negative")
    if cfg.activations_every < 1:
        raise ValueError(f"--activations-every {cfg.activations_every} must be at least 1")
    fit_seq_len(cfg.seq_len, math.inf)
    check_batches(cfg.batch_size, cfg.grad_accum, flags.get("image_workers"))
    check_length(cfg.epochs, cfg.max_steps)
    check_lr(cfg.lr)
    if not flags.get("alpha", 1.0) > 0:
        raise ValueError(f"{shown(cfg, 'alpha')} must be a positive number: it scales what the adapter adds")
    check_keep_last(cfg.keep_last)
    if not cfg.resume:  # a run that is finished needs its files and packages no more
        check_chat_format(cfg.chat_format)
        check_loggers(cfg)
        for path in (cfg.data, cfg.eval_data):
            if path is not None:
                path.stat()
    if cfg.step_in_backward:
        step_in_backward.check(grad_accum=cfg.grad_accum, max_grad_norm=cfg.max_grad_norm, dtype=dtype)
    if "quantize" in flags:
        check_head(linear_kind(cfg.quantize), cfg.quantize_head)
    by_hand = flags.get("fused") and not flags.get("dropout")
    recomputed = cfg.activations in ("lean", "offload") and cfg.activations_every == 1 and not cfg.activations_gib
    if cfg.weights != "resident" and not (by_hand or recomputed):
        raise ValueError(NEEDS_RECOMPUTATION)
    if flags.get("activations_host_gib") and not (by_hand and cfg.activations == "offload"):
        raise ValueError(NEEDS_HAND_WRITTEN)
    if "method" in flags:
        check_method(cfg, dtype)
    elif "rank" in flags:
        check_sizes(cfg.rank, cfg.dropout, cfg.targets)
    if "vision" in flags:
        check_vision(cfg, dtype)
    if "init_projector" in flags and dtype == torch.float16:
        raise ValueError(FLOAT16)
    if "trainable" in flags:
        check_trainable(cfg)
    say_ignored(cfg)


def check_method(cfg: Any, dtype: torch.dtype) -> None:
    """peft_finetune.py's."""
    method = find_method(cfg.method)
    check_options(cfg.method, options := method_options(cfg))
    read_tokens(cfg.new_tokens)
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
    if cfg.modules_to_save:
        whole_modules.check_dtype(dtype)


def method_options(cfg: Any) -> Options:
    """What the flags say of a method. The recipe adds what comes from the tokenizer, the model and the data."""
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
    """vlm_finetune.py's."""
    how = parts_of(cfg)
    check_parts(how, quantize_head=cfg.quantize_head)
    if dtype == torch.float16 and "full" in how.values():
        raise ValueError(FLOAT16)
    if cfg.language == "full" and (cfg.embedding == "host" or cfg.weights != "resident"):
        raise ValueError("--embedding host and --weights stream are for frozen weights: not with --language full")
    given = [(part, rate) for part in how if (rate := getattr(cfg, f"{part}_lr")) is not None]
    if wrong := [f"--{part}-lr {rate}" for part, rate in given if not 0 <= rate < math.inf]:
        raise ValueError(f"{', '.join(wrong)} must be a positive number, or 0 to leave the part as it is")


def parts_of(cfg: Any) -> dict[str, str]:
    """How each part of a vision-language model is trained: frozen, lora or full."""
    return {part: getattr(cfg, part) for part in ("vision", "projector", "language")}


def check_trainable(cfg: Any) -> None:
    """full_finetune.py's."""
    try:
        re.compile(cfg.trainable or "")
    except re.error as error:
        raise ValueError(f"--trainable {cfg.trainable!r} is not a regular expression: {error}") from None
    if cfg.weights != "resident" and not (cfg.freeze_layers or cfg.trainable):
        raise ValueError(ARE_FROZEN)


def say_ignored(cfg: Any) -> None:
    """A line for each flag that was given (its value is not the default) and that another one leaves without effect."""
    for names, why in ignored(cfg):
        for field in dataclasses.fields(cfg):
            # Who writes out what happens anyway is not mistaken: 20 virtual tokens.
            same = (field.default, getattr(Options, field.name, field.default))
            if field.name in names and getattr(cfg, field.name) not in same:
                say(f"note: {shown(cfg, field.name)} has no effect {why}")


def ignored(cfg: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of settings that do nothing in this run, and why."""
    flags = vars(cfg)
    if cfg.eval_data is None:
        yield ("eval_every",), "without --eval-data"
    if cfg.activations in ("none", "fast"):
        yield ("activations_every", "activations_gib"), f"with --activations {cfg.activations}"
    if "method" in flags:
        yield from ignored_by_method(cfg)
    if "vision" in flags:
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
    if cfg.language != "lora":
        yield ("targets",), f"with --language {cfg.language}"
    if cfg.vision == cfg.language == "full":
        yield ("quantize",), "with --vision full and --language full: what is trained in full is not quantised"


def describe_choices(cfg: Any) -> str:
    """How frozen weights, activations and moments are kept: what a run's start says in one line."""
    names = ("quantize", "activations", "optimizer")
    return ", ".join(f"{name} {getattr(cfg, name)}" for name in names if hasattr(cfg, name))


def shown(cfg: Any, name: str) -> str:
    """A flag as on the command line."""
    value = getattr(cfg, name)
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
