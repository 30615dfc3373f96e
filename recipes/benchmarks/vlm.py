"""A vision-language model: LLaVA-1.5-7B's shape, every row of the batch with one image of 336 × 336 pixels.

Its language model gets LoRA on all linear layers; vision tower and projector are frozen, as LLaVA's own LoRA runs have
the tower. A row is a token, an image (576 tokens) and text; its last tokens are targets, and every token counts in
tokens/s, as in recipes/benchmarks/measure.py. Does the GPU wait for images? That is measured with JPEG files, decoded
by the recipes' own loader while the GPU trains, against the same steps on a batch that is there already.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data.batches import Batch, Batches
from data.images.files import ImageFiles
from data.images.load import load_image_processor
from models import build_model
from modules.adapters.lora import ALL_LINEAR
from modules.attention import choose_attention, use_attention
from modules.fused.blocks import why_not
from modules.loss import IGNORE_INDEX, linear_cross_entropy
from modules.memory.activations import keep_activations
from modules.memory.weight_streaming import StreamedWeights
from modules.optim import build_optimizer
from recipes.benchmarks import measure, peers
from recipes.benchmarks.card import GIB, SPARE_BYTES, fit_line, host_memory, lift_limit, limit_memory
from recipes.benchmarks.measure import UNTIMED, WARM_UP_LENGTH, Machine, Row
from recipes.benchmarks.vlm_model import PRESET, model_config, random_batch, random_model, random_rows

BATCH, LENGTH, TARGETS = 4, 1024, 256
LENGTHS = (32768, 65536)  # for the straight line through memory
LONGEST_CAP_GIB = 24.0
SMALL_CAP_GIB = 8.0
LOADING_STEPS = 43
PEER = peers.PEERS["peft"]
FILES, PIXELS = 64, (1152, 896)  # a megapixel each
TINY_LENGTHS = {LENGTH: 32, TARGETS: 8, LENGTHS[0]: 64, LENGTHS[1]: 128}
Measurement = tuple[dict, Callable[[], dict]]


def measurements(
    machine: Machine,
    *,
    steps: int,
    budgets: tuple[float, ...] = (),
    host_gib: float = 0.0,
    embedding: str = "resident",
    head: bool = False,
) -> Iterator[Measurement]:
    """What there is to measure, each as its settings, a name among them, and a function that does it."""
    lora = Row(PRESET, BATCH, LENGTH, embedding=embedding, compile=machine.on_cuda)
    qlora = replace(lora, quantize="nf4", quantize_head=head)
    for row in (lora, qlora):
        ways = [replace(row, activations=rung) for rung in ("fast", "lean", "offload")]
        ways += [replace(row, activations="offload", activations_gib=gib) for gib in budgets]
        if host_gib:
            ways += [replace(way, activations_host_gib=host_gib) for way in ways if way.activations == "offload"]
        for way in ways:
            yield settings("speed", way), lambda way=way: build_and_train(way, machine, steps=steps)
    for row in (lora, qlora):
        if missing := peers.missing(PEER, row):
            print(f"vlm: {row.column}: peers skipped, not installed: {', '.join(missing)}", flush=True)
            continue
        described = {"measurement": "peers", "name": f"{row.column}, {PEER.name}"} | peers.settings(PEER, row)
        yield described, lambda row=row: train_peer(row, machine, steps=steps)
    small = replace(qlora, activations="offload", cap_gib=SMALL_CAP_GIB)
    yield settings("small", small), lambda: build_and_train(small, machine, steps=steps)
    loading = replace(lora, activations="lean")
    yield settings("loading", loading, "JPEG files"), lambda: measure_loading(loading, machine, steps)
    yield from longest(replace(qlora, batch=1, activations="offload", rank=32), machine)


def settings(measurement: str, row: Row, *words: str) -> dict:
    words = (row.column, row.way, *words, *((f"{row.cap_gib:g} GiB cap",) if row.cap_gib else ()))
    return {"measurement": measurement, "name": ", ".join(words)} | asdict(row)


def longest(row: Row, machine: Machine) -> Iterator[Measurement]:
    """One full step over one row with one image, everything in host memory that can be there, at two lengths; then at
    the length for which the line through them leaves room under the cap."""
    row = replace(row, weights="stream", embedding="host", optimizer="adamw-host")
    points: list[tuple[float, float]] = []

    def fitted(row: Row) -> dict:
        figures = build_and_train(row, machine, steps=1, targets=None, warm_up=True)
        points.append((row.length, figures["card_gib"]))
        return figures

    for length in LENGTHS:
        free = replace(row, length=length)
        yield settings("longest", free, "weights streamed"), lambda free=free: fitted(free)
    if len(points) < 2 or None in points[0]:
        print("vlm: no line through memory: the card's was not measured at two lengths", flush=True)
        return
    fixed, slope = fit_line(points)
    length = int((LONGEST_CAP_GIB - SPARE_BYTES / GIB - fixed) / slope) // 64 * 64
    line = {"fixed_gib": round(fixed, 3), "kb_per_token": round(slope * GIB / 1000, 2)}
    print(f"vlm: longest: {fixed:.2f} GiB + {line['kb_per_token']} KB per token", flush=True)
    capped = replace(row, length=length, cap_gib=LONGEST_CAP_GIB)
    described = settings("longest", capped, "weights streamed")
    yield described, lambda: build_and_train(capped, machine, steps=1, targets=None) | line


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
    targets: int | None = TARGETS,
    warm_up: bool = False,
    loaded: Iterator[Batch] | None = None,
) -> dict:
    """Train for some steps on one batch, or on those that `loaded` gives, set up as recipes/vlm_finetune.py does."""
    device, dtype = machine.device, machine.dtype
    length, targets = (TINY_LENGTHS.get(n, n) if machine.tiny else n for n in (row.length, targets))
    language = model.language_model
    model.zero_grad()
    attention = choose_attention(language.config, device, dtype, batch=row.batch, length=length)
    if reason := why_not(language):
        raise ValueError(f"no hand-written blocks: {reason}")
    measures = dict(budget=row.activations_gib * GIB, host_budget=row.activations_host_gib * GIB, fused=True)
    bind = streamed.use if streamed else None
    offload = keep_activations(language, row.activations, **measures, compile=row.compile, bind=bind)
    keep_activations(model.vision_tower, "none", compile=row.compile)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(row.optimizer, trainable, lr=1e-4, weight_decay=0.0)

    def step(batch: Batch) -> float:
        hidden = model(batch.input_ids, batch.layout, images=batch.images)
        loss = linear_cross_entropy(hidden, model.lm_head, batch.targets, index=batch.target_index)
        loss = loss / batch.target_tokens
        del hidden
        loss.backward()
        clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    if warm_up or row.cap_gib:
        short = length if machine.tiny else min(length, WARM_UP_LENGTH)
        step(random_batch(model, row, short, targets).to(device, dtype))
    if row.cap_gib:
        limit_memory(row.cap_gib, device)
    ready = random_batch(model, row, length, targets).to(device, dtype)
    try:
        figures = measure.run_steps(
            lambda: step(next(loaded).to(device, dtype) if loaded else ready),
            steps=steps,
            untimed=UNTIMED,
            tokens=row.batch * length,
            on=device,
        )
    finally:
        lift_limit(device)
    if row.cap_gib:
        figures["within_cap"] = None if figures["card_gib"] is None else figures["card_gib"] <= row.cap_gib
    return figures | {"attention": attention} | host_memory(language, offload, streamed, optimizer, device)


def measure_loading(row: Row, machine: Machine, steps: int) -> dict:
    """Tokens per second with files that are decoded meanwhile, and how much of its time the GPU waits for them."""
    steps = steps if machine.tiny else LOADING_STEPS
    model, _ = random_model(row, machine)
    ready = train(model, None, row, machine, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        batches = jpeg_batches(model, row, machine, Path(folder))
        loaded = (batch for _, _, (batch,) in batches.steps())
        try:
            figures = train(model, None, row, machine, steps=steps, loaded=loaded)
        finally:
            loaded.close()  # its threads end before their files go
    speeds = {"tokens_per_second_preloaded": ready["tokens_per_second"], "image_workers": batches.image_workers}
    return figures | speeds | {"idle_share": round(1 - figures["tokens_per_second"] / ready["tokens_per_second"], 4)}


def jpeg_batches(model: nn.Module, row: Row, machine: Machine, folder: Path) -> Batches:
    """The recipes' loader over rows whose images are JPEG files, made here: soft shapes under some noise."""
    size, files = (PIXELS, FILES) if not machine.tiny else ((64, 48), 4)
    for i in range(files):
        generator = torch.Generator().manual_seed(i)
        coarse = torch.randint(256, (size[1] // 16, size[0] // 16, 3), generator=generator, dtype=torch.uint8)
        soft = Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC)
        grain = Image.merge("RGB", [Image.effect_noise(size, 24)] * 3)
        Image.blend(soft, grain, 0.2).save(folder / f"{i}.jpg", quality=90)
    side = model.config.vision.image_size
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    images = ImageFiles(load_image_processor(folder, model_config(machine)), "random rows", folder)
    for i in range(files):
        images.check(f"{i}.jpg")
        images.add((f"{i}.jpg",), i + 1)
    length, targets = (TINY_LENGTHS[n] if machine.tiny else n for n in (row.length, TARGETS))
    return Batches(random_rows(model, files, length, targets, images), batch_size=row.batch, shuffle=True)


# ---------------------------------------------------------------------------------------------------------------------
# transformers + peft


def train_peer(row: Row, machine: Machine, *, steps: int) -> dict:
    """The same rows and the same clock, set up as recipes/benchmarks/peers.py sets up a Llama."""
    device = machine.device
    model = peer_model(row, machine)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)
    length, targets = (TINY_LENGTHS[n] if machine.tiny else n for n in (row.length, TARGETS))
    batch = random_batch(build_model(model_config(machine)), row, length, targets)
    labels = batch.input_ids.clone()
    labels[:, : length - targets] = IGNORE_INDEX
    given = {"input_ids": batch.input_ids, "labels": labels, "pixel_values": batch.pixel_values.to(machine.dtype)}
    given = {name: tensor.to(device) for name, tensor in given.items()}

    def step() -> float:
        with torch.autocast(device.type, machine.dtype, enabled=machine.dtype != torch.float32):
            loss = model(**given).loss
        loss.backward()
        clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    use_attention("default")  # PyTorch's own choice, whatever the rows before measured as best
    return measure.run_steps(step, steps=steps, untimed=UNTIMED, tokens=row.batch * length, on=device)


def peer_model(row: Row, machine: Machine) -> nn.Module:
    """Random weights made on the device, no files."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    torch.manual_seed(0)
    config = model_config(machine)
    parts = {"text_config": LlamaConfig(**config["text_config"], use_cache=False)}
    parts |= {"vision_config": CLIPVisionConfig(**config["vision_config"])}
    config = LlavaConfig(**parts, image_token_index=config["image_token_index"])
    with machine.device:
        model = AutoModelForImageTextToText.from_config(config, dtype=machine.dtype, attn_implementation="sdpa")
    if row.quantize == "nf4":
        towers = model.model.language_model.layers, model.model.vision_tower.encoder.layers
        peers.quantize_blocks([block for blocks in towers for block in blocks], machine)
        model.is_loaded_in_4bit = True  # peft asks for it
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = rf".*language_model.*\.({'|'.join(ALL_LINEAR)})"
    return get_peft_model(model, LoraConfig(r=row.rank, lora_alpha=2 * row.rank, target_modules=targets)).train()
