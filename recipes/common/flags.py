"""The flags that training recipes share, by topic.

A recipe's `Config` inherits the topics it needs, adds its own flags, and declares again those with another default.
A copy of a recipe can leave out a topic (say memory) and the code that reads it.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import tyro

from modules.adapters.lora import ALL_LINEAR


@dataclass(kw_only=True)
class ModelFlags:
    model: str
    """Checkpoint folder, or a Hub id such as meta-llama/Llama-3.2-1B."""
    chat_format: str = "auto"
    """Chat template: auto (the checkpoint's own), llama2, llama3, chatml, vicuna, llava or a .jinja file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps …"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of weights and activations; auto: bfloat16 or float16 on a GPU, float32 on the CPU."""
    compile: bool = torch.cuda.is_available()
    """Use torch.compile; default: where there is a CUDA device, whose compiler pays for its start-up."""
    deterministic: bool = False
    """On CUDA: only kernels that give the same bits every time (slower)."""


@dataclass(kw_only=True)
class DataFlags:
    data: Path
    """Training rows: JSON Lines or a JSON array."""
    eval_data: Path | None = None
    """Held-out rows for the evaluation loss."""
    prompt_field: str | None = None
    """Column to use as the prompt, with --completion-field."""
    completion_field: str | None = None
    """Column to use as the completion, with --prompt-field."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are trained: all assistant turns (completions), the last one, or everything."""
    on_special_content: Literal["keep", "error"] = "keep"
    """What to do with rows whose own text contains special tokens."""
    seq_len: int | None = None
    """Rows are cut (packs filled) to this many tokens; default: 2048, or what the model has if that is less."""
    packing: bool = False
    """Put several rows into one sequence; they do not see each other."""
    shuffle: bool = True
    """Draw a new order every epoch."""
    seed: int = 0
    """Seed of everything random."""
    batch_size: int = 1
    """Rows (packs) per micro-batch."""
    grad_accum: int = 1
    """Micro-batches per optimizer step."""


@dataclass(kw_only=True)
class ImageFlags:
    image_root: Path | None = None
    """Folder that image files are named relative to, and may not lie outside of; default: the data file's."""
    skip_bad_rows: bool = False
    """Leave rows out whose image is missing or broken, and say how many; otherwise they are an error."""
    image_workers: int | None = None
    """Threads that decode images ahead of the training; default: one per processor, at most 8."""


@dataclass(kw_only=True)
class ScheduleFlags:
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """End after this many optimizer steps at the latest; 0 saves the initial state."""
    lr: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What the learning rate does after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-host"] = "adamw"
    """AdamW with its moments in float32, in 8 bits, or in host memory."""


@dataclass(kw_only=True)
class AdapterFlags:
    rank: int = 16
    """Rank r of the adapters."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] | None = ALL_LINEAR
    """Layers to adapt, by name: q_proj, self_attn.q_proj, lm_head, embed_tokens, or a full name."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which adapters are kept; bfloat16 ones are updated with stochastic rounding."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full as well, by name: norm, lm_head, embed_tokens …"""
    new_tokens: tuple[str, ...] = ()
    """Special tokens that the model does not know, or a file of them; only their embedding rows are trained."""


@dataclass(kw_only=True)
class MethodFlags(AdapterFlags):
    rank_pattern: tuple[str, ...] = ()
    """Layers of LoRA and its relatives with another rank: q_proj=8 layers.0.mlp.down_proj=32 …"""
    alpha_pattern: tuple[str, ...] = ()
    """Layers with another alpha, likewise."""
    num_virtual_tokens: int | None = None
    """Of prompt, p-tuning and prefix, in front of every row; --seq-len counts them. Default: --prompt-text's, or 20."""
    prompt_init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """What virtual tokens begin as: frequent tokens, noise, or --prompt-text (prompt and prefix)."""
    prompt_text: str | None = None
    """The text that virtual tokens begin as, with --prompt-init text."""
    prompt_encoder: Literal["mlp", "lstm"] | None = None
    """The network that makes virtual tokens: p-tuning mlp (default) or lstm; prefix none (default) or mlp."""
    encoder_size: int | None = None
    """Its hidden size; default: p-tuning the model's, prefix 512."""


@dataclass(kw_only=True)
class MemoryFlags:
    activations: Literal["none", "fast", "lean", "offload"] = "lean"
    """What a block keeps for backward. none: everything; fast: what is expensive to recompute; lean: only its input;
    offload: that input, in host memory."""
    activations_every: int = 1
    """With lean and offload: only every k-th block; the others are kept as with fast."""
    activations_gib: float = 0.0
    """With lean and offload: as many of the last blocks as fit into this memory are kept as with fast."""
    weights: Literal["resident", "stream", "disk"] = "resident"
    """Where frozen blocks live: on the device, or in host memory or a scratch file, copied there one block ahead."""
    step_in_backward: bool = False
    """Update each weight as soon as its gradient is complete, and free the gradient; needs --max-grad-norm 0."""


@dataclass(kw_only=True)
class FullFlags(MemoryFlags):
    master_weights: bool = False
    """Keep the weights in float32 and cast them where they are used."""


@dataclass(kw_only=True)
class FrozenFlags(MemoryFlags):
    quantize: Literal["none", "nf4", "int8", "int4", "float8"] = "none"
    """Keep the frozen linear layers of the blocks in 4 or 8 bits."""
    quantize_head: bool = False
    """Quantise the output head as well; losses rise slightly."""
    embedding: Literal["resident", "host"] = "resident"
    """Where the input embedding lives: on the device, or in host memory, from where a batch's rows are copied."""


@dataclass(kw_only=True)
class FusedFlags(FrozenFlags):
    fused: bool = True
    """Run the blocks by the fused modules/fused/lora_block.py where it computes what the model's file says."""
    activations_host_gib: float = 0.0
    """With offload: GiB of host memory for attention outputs; blocks that fit do not recompute attention."""


@dataclass(kw_only=True)
class RunFlags:
    output: Path
    """Folder for everything this run writes."""
    eval_every: int | None = None
    """Evaluate every this many steps; default: at the end only."""
    save_every: int = 500
    """Save a resumable checkpoint every this many steps, and at the end; 0: only when interrupted."""
    keep_last: int = 2
    """How many of those checkpoints to keep."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint."""
    tensorboard: bool = False
    """Also log to OUTPUT/tensorboard (pip install -e ".[loggers]")."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""


@dataclass(kw_only=True)
class TrainingFlags(ModelFlags, DataFlags, ScheduleFlags, RunFlags):
    """What every training recipe has; a slim copy may inherit fewer."""


C = TypeVar("C")


def parse_flags(config: type[C], args: Sequence[str] | None = None) -> C:
    """The command line as a `config`; --help shows a group of flags for each dataclass that it inherits."""
    topics = [c for c in config.__mro__ if dataclasses.is_dataclass(c)]
    docs = {name: doc for topic in reversed(topics) for name, doc in docstrings(topic).items()}
    hints = typing.get_type_hints(config)
    groups = {topic: [] for topic in topics}
    for field in dataclasses.fields(config):
        topic = next(c for c in reversed(topics) if field.name in c.__annotations__)
        hint = Annotated[hints[field.name], tyro.conf.arg(help=docs.get(field.name))]
        groups[topic].append((field.name, hint, dataclasses.field(default=field.default, kw_only=True)))
    # tyro shows a nested dataclass as a group; without a prefix its flags keep their plain names.
    nested = [
        (name, tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass(name, fields)])
        for topic, fields in groups.items()
        if fields and (name := "recipe" if topic is config else topic.__name__.removesuffix("Flags").lower())
    ]
    description = inspect.getdoc(inspect.getmodule(config))
    parsed = tyro.cli(dataclasses.make_dataclass(config.__name__, nested), args=args, description=description)
    return config(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def docstrings(topic: type) -> dict[str, str]:
    """The docstring under each field that a dataclass declares itself."""
    body = ast.parse(textwrap.dedent(inspect.getsource(topic))).body[0].body
    return {
        field.target.id: doc.value.value
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }
