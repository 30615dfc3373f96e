"""What the parts of recipes/benchmark.py share: a model with random weights, trained for a few steps.

How everything is counted:

    tokens/s     batch · length tokens per step (every token but a row's first is a target), mean over the steps after
                 the first three; forward, backward, clip_grad_norm_, the optimizer's step and loss.item() included
    peak GiB     torch.cuda.max_memory_allocated over all steps: what the tensors took
    card GiB     everything the card shows as used at the peak: max_memory_reserved, and what CUDA has for itself
    host GiB     page-locked activations, streamed weights, an embedding and optimizer states in host memory
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from checkpointing.pretrained import put_weight
from data.batches import Batch
from models import build_model
from models.llama import PRESETS
from modules.adapters.lora import add_lora
from modules.adapters.vlm_parts import name_in_language_model
from modules.attention import choose_attention, padded_layout
from modules.fused.blocks import why_plain
from modules.loss import linear_cross_entropy
from modules.memory.activations import checkpoint_activations
from modules.memory.host_embedding import keep_embedding_on_host
from modules.memory.step_in_backward import step_in_backward
from modules.memory.weight_streaming import StreamedWeights, stream_weights
from modules.optim import build_optimizer
from recipes.benchmarks import card

UNTIMED = 3  # first steps, in which kernels are compiled and memory is found
WARM_UP_LENGTH = 1024
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TINY |= dict(head_dim=16, vocab_size=512)


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype
    tiny: bool
    """Replace every preset by a two-layer model, for a dry run in seconds."""

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def config(self, preset: str) -> dict:
        """The preset's config.json."""
        return PRESETS[preset] | {"architectures": ["LlamaForCausalLM"]} | (TINY if self.tiny else {})


@dataclass(frozen=True)
class Row:
    """One training run to be measured. Nearly every field is a flag of the recipes."""

    preset: str
    batch: int
    length: int
    """Tokens per row of the batch."""
    quantize: str = "none"
    quantize_head: bool = False
    embedding: str = "resident"
    rank: int = 16
    """Of the adapters on all linear layers; 0: every weight is trained."""
    activations: str = "lean"
    activations_gib: float = 0.0
    activations_host_gib: float = 0.0
    fused: bool = True
    """By the fused blocks, or by the plain modules."""
    compile: bool = True
    weights: str = "resident"
    optimizer: str = "adamw"
    step_in_backward: bool = False
    cap_gib: float | None = None
    """What the whole card may show as used."""

    @property
    def method(self) -> str:
        if self.rank == 0:
            return "full"
        return "LoRA" if self.quantize == "none" else "QLoRA"

    @property
    def column(self) -> str:
        """8B QLoRA 2×2048."""
        return f"{self.preset.rpartition('-')[2].upper()} {self.method} {self.batch}×{self.length}"

    @property
    def way(self) -> str:
        """offload + 0.4 GiB, hand-written, embedding on host."""
        extra = f" + {self.activations_gib:g} GiB" if self.activations_gib else ""
        extra += f" + {self.activations_host_gib:g} GiB of the host" if self.activations_host_gib else ""
        plain = "plain, compiled" if self.compile else "plain"
        words = [self.activations + extra, "hand-written" if self.fused else plain]
        words += ["head in NF4"] if self.quantize_head else []
        words += ["embedding on host"] if self.embedding == "host" else []
        return ", ".join(words)


def activation_modes(row: Row, budgets_gib: Sequence[float] = (), host_gib: float = 0.0) -> list[Row]:
    """The row with each kind of activation checkpointing; offload also with blocks kept in so much memory, and with
    so much host memory for what attention made."""
    rows = [replace(row, activations=mode) for mode in ("fast", "lean", "offload")]
    rows += [replace(row, activations="offload", activations_gib=gib) for gib in budgets_gib]
    if host_gib:
        rows += [replace(row, activations_host_gib=host_gib) for row in rows if row.activations == "offload"]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# A model


def random_model(row: Row, machine: Machine, config: dict | None = None) -> tuple[nn.Module, StreamedWeights | None]:
    """The row's model with random weights made on the device, one at a time, as if read from a checkpoint.

    Each is quantised, and each block sent to the host, as it arrives: a model of any size passes through a small card.
    `config` is a config.json in place of the preset's. Of a vision-language model only the language model is trained.
    """
    torch.manual_seed(0)  # for the adapters
    generator = torch.Generator(machine.device).manual_seed(0)
    model = build_model(config or machine.config(row.preset)).requires_grad_(row.rank == 0)
    language = getattr(model, "language_model", model)
    if row.quantize == "nf4":
        from modules.quantization.nf4 import quantize_nf4  # torchao takes seconds to import

        quantize_nf4(language, head=row.quantize_head)
        if language is not model:
            quantize_nf4(model.vision_tower)
            model.lm_head = language.lm_head
    if row.embedding == "host":
        keep_embedding_on_host(language, machine.device)
    streamed = stream_weights(language, machine.device) if row.weights == "stream" else None
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=machine.dtype, device=machine.device)
        is_norm = weight.ndim == 1 and name.endswith("weight")
        weight.fill_(1.0) if is_norm else weight.normal_(0.0, 0.02, generator=generator)
        put_weight(model, name, weight)
        if streamed:
            streamed.take(name if language is model else name_in_language_model(model, name))
    model.tie_weights()
    if row.rank:
        add_lora(language, rank=row.rank, alpha=2.0 * row.rank)
    return model.train(), streamed


def random_batch(row: Row, length: int, vocabulary: int) -> Batch:
    """Rows of random tokens, on the CPU; every token but a row's first is a target."""
    ids = torch.randint(vocabulary, (row.batch, length), generator=torch.Generator().manual_seed(1))
    index = torch.arange(row.batch * length).view(row.batch, length)[:, :-1].flatten()
    return Batch(ids, padded_layout(length), index, ids[:, 1:].flatten())


def flops_per_token(row: Row, config) -> float:
    """Operations that training needs per token, nothing computed twice.

    A matrix of N numbers takes 2 N in forward and 2 N for the gradient of its input; its own gradient, another 2 N, a
    frozen one does without. Causal attention takes 2 T N H in forward (half of all pairs) and twice that in backward.
    """
    D, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    block = 2 * D * (heads + config.num_key_value_heads * config.head_dim) + 3 * D * config.intermediate_size
    products = config.num_hidden_layers * block + config.vocab_size * D
    return (4 if row.rank else 6) * products + 6 * row.length * heads * config.num_hidden_layers


# ---------------------------------------------------------------------------------------------------------------------
# A run


def build_and_train(row: Row, machine: Machine, **settings) -> dict:
    return train(*random_model(row, machine), row, machine, **settings)


def train(
    model: nn.Module,
    streamed: StreamedWeights | None,
    row: Row,
    machine: Machine,
    *,
    steps: int,
    untimed: int = UNTIMED,
    lr: float = 1e-4,
    warm_up: bool = False,
    make_batch: Callable[[int], Batch] | None = None,
    loaded: Iterator[Batch] | None = None,
) -> dict:
    """Train the model for some steps on one batch, set up as the recipes do; → the figures.

    `make_batch(length)` makes the batch (default: random tokens); with `loaded` each step takes the next one from
    there. Under a cap, or to warm up, a short step goes first: it compiles and loads every kernel, so that what CUDA
    takes for itself is known, and what the compiler tries out counts nowhere.
    """
    device, dtype = machine.device, machine.dtype
    language = getattr(model, "language_model", model)  # of a vision-language model the part that is trained
    make_batch = make_batch or (lambda length: random_batch(row, length, model.config.vocab_size))
    model.zero_grad()  # an earlier run may have ended in the middle of a step
    attention = choose_attention(language.config, device, dtype, batch=row.batch, length=row.length)
    if row.fused and (reason := why_plain(language)):
        raise ValueError(f"no fused blocks: {reason}")
    offload = checkpoint_activations(
        language,
        row.activations,
        budget=row.activations_gib * card.GIB,
        host_budget=row.activations_host_gib * card.GIB,
        fused=row.fused,
        compile=row.compile,
        bind=streamed.use if streamed else None,
    )
    if language is not model:
        checkpoint_activations(model.vision_tower, "none", compile=row.compile)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(row.optimizer, trainable, lr=lr, weight_decay=0.0)
    norm_of_backward = None
    if row.step_in_backward:
        norm_of_backward = step_in_backward(optimizer, grad_accum=1, max_grad_norm=0.0, dtype=dtype)

    def step(batch: Batch) -> float:
        images = {} if batch.images is None else {"images": batch.images}
        hidden = model(batch.input_ids, batch.layout, **images)
        loss = linear_cross_entropy(hidden, model, batch.targets, index=batch.target_index)
        loss = loss / batch.target_tokens
        del hidden
        loss.backward()
        if norm_of_backward:
            norm_of_backward()
        else:
            clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    if warm_up or row.cap_gib:
        step(make_batch(min(row.length, WARM_UP_LENGTH)).to(device, dtype))
    if row.cap_gib:
        card.limit_memory(row.cap_gib, device)
    ready = make_batch(row.length).to(device, dtype)
    try:
        figures = run_steps(
            lambda: step(next(loaded).to(device, dtype) if loaded else ready),
            steps=steps,
            untimed=untimed,
            tokens=row.batch * row.length,
            on=device,
        )
    finally:
        card.lift_limit(device)
    if row.cap_gib:
        figures["within_cap"] = None if figures["card_gib"] is None else figures["card_gib"] <= row.cap_gib
    if language is model:
        figures["flops_per_token"] = flops_per_token(row, model.config)
    return figures | {"attention": attention} | card.host_memory(language, offload, streamed, optimizer, device)


def run_steps(step: Callable[[], float], *, steps: int, untimed: int, tokens: int, on: torch.device) -> dict:
    """Call `step`, which returns the loss, `steps` times; → speed, memory and losses."""
    card.free_memory(on)
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    losses, seconds = [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(step())
        card.synchronize(on)
        seconds.append(time.perf_counter() - started)
    timed = seconds[min(untimed, steps - 1) :]
    return {
        "tokens_per_second": round(tokens * len(timed) / sum(timed), 1),
        "first_step_seconds": round(seconds[0], 2),
        "steps": steps,
        "timed_steps": len(timed),
        "peak_gib": round(torch.cuda.max_memory_allocated(on) / card.GIB, 3) if on.type == "cuda" else None,
        "card_gib": card.card_gib(on),
        "losses": [round(loss, 6) for loss in losses],
    }


def shared_model(row: Row, machine: Machine) -> Callable[..., dict]:
    """`train` for rows that can use one and the same model, which may take a minute to make."""
    built = card.attempt(machine.device, lambda: {"model": random_model(row, machine)})

    def measure(row: Row, **settings) -> dict:
        if "failed" in built:
            return built
        return card.attempt(machine.device, train, *built["model"], row, machine, **settings)

    return measure
