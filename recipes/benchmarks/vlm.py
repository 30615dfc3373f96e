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
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from data.batches import Batch, Batches
from data.dataset import TokenizedDataset
from data.dataset_report import DatasetReport
from data.images.files import ImageFiles
from data.images.load import load_image_processor
from models import build_model
from models.llava import PRESETS
from modules.adapters.lora import ALL_LINEAR
from modules.attention import padded_layout, use_attention
from modules.image_tokens import place_images
from modules.loss import IGNORE_INDEX
from modules.memory.weight_streaming import StreamedWeights
from recipes.benchmarks import measure, peers
from recipes.benchmarks.card import GIB, SPARE_BYTES, fit_line
from recipes.benchmarks.measure import TINY, Machine, Row, activation_modes

PRESET = "llava-1.5-7b"
TINY_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TINY_VISION |= dict(image_size=28, patch_size=14)
BATCH, LENGTH, TARGETS = 4, 1024, 256
LENGTHS = (32768, 65536)  # for the straight line through memory
LONGEST_CAP_GIB = 24.0
SMALL_CAP_GIB = 8.0
LOADING_STEPS = 43
PEER = peers.PEERS["peft"]
FILES, PIXELS = 64, (1152, 896)  # a megapixel each
TINY_LENGTHS = {LENGTH: 32, TARGETS: 8, LENGTHS[0]: 64, LENGTHS[1]: 128}
Measurement = tuple[dict, Callable[[], dict]]


def measurements(flags, machine: Machine) -> Iterator[Measurement]:
    """Each measurement: its settings, which include a name, and a function that does it; by benchmark.py's flags."""
    steps = flags.steps
    lora = Row(PRESET, BATCH, LENGTH, embedding=flags.embedding, compile=machine.on_cuda)
    qlora = replace(lora, quantize="nf4", quantize_head=flags.quantize_head)
    for row in (lora, qlora):
        for way in activation_modes(row, flags.activations_gib, flags.activations_host_gib):
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
# A model, and rows with an image


def model_config(machine: Machine) -> dict:
    """The preset's config.json."""
    config = PRESETS[PRESET] | {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    if machine.tiny:
        text = config["text_config"] | TINY | {"num_key_value_heads": TINY["num_attention_heads"]}
        vision = config["vision_config"] | TINY_VISION
        config |= {"text_config": text, "vision_config": vision, "image_token_index": TINY["vocab_size"] - 1}
    return config


def random_batch(model: nn.Module, row: Row, length: int, targets: int | None) -> Batch:
    """Rows of a token, one image and text, on the CPU; the last `targets` tokens of each are trained, or all text."""
    dataset = random_rows(model, row.batch, length, targets)
    rows = [dataset[i] for i in range(row.batch)]
    input_ids, wanted = (torch.stack(columns).long() for columns in zip(*rows, strict=True))
    index = (wanted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    vision = model.config.vision
    shape = (row.batch, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sizes = dict(image_token=model.config.image_token, tokens_per_image=model.config.tokens_per_image)
    images = place_images(input_ids, pixels, **sizes)
    return Batch(input_ids, padded_layout(length), index, wanted.flatten()[index], images)


def random_rows(model: nn.Module, count: int, length: int, targets: int | None, images=None) -> TokenizedDataset:
    config = model.config
    image = slice(1, 1 + config.tokens_per_image)
    if length <= image.stop:
        raise ValueError(f"{length} tokens are too few for an image of {config.tokens_per_image}")
    ids = torch.randint(config.image_token, (count, length), generator=torch.Generator().manual_seed(1))
    ids[:, image] = config.image_token
    wanted = torch.full_like(ids, IGNORE_INDEX)
    first = length - 1 - targets if targets else image.stop
    wanted[:, first:-1] = ids[:, first + 1 :]
    offsets = torch.arange(count + 1) * length
    report = DatasetReport("random rows", length)
    return TokenizedDataset(ids.flatten().int(), wanted.flatten().int(), offsets, report, "", images)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def build_and_train(row: Row, machine: Machine, **settings) -> dict:
    return train(*measure.random_model(row, machine, config=model_config(machine)), row, machine, **settings)


def train(
    model: nn.Module,
    streamed: StreamedWeights | None,
    row: Row,
    machine: Machine,
    *,
    targets: int | None = TARGETS,
    **settings,
) -> dict:
    """Train for some steps, set up as recipes/vlm_finetune.py does."""
    length, targets = (TINY_LENGTHS.get(n, n) if machine.tiny else n for n in (row.length, targets))
    row = replace(row, length=length)
    settings |= {"make_batch": lambda length: random_batch(model, row, length, targets)}
    return measure.train(model, streamed, row, machine, **settings)


def measure_loading(row: Row, machine: Machine, steps: int) -> dict:
    """Tokens per second with files that are decoded meanwhile, and how much of its time the GPU waits for them."""
    steps = steps if machine.tiny else LOADING_STEPS
    model, _ = measure.random_model(row, machine, config=model_config(machine))
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
        soft = Image.frombytes("RGB", (size[0] // 16, size[1] // 16), bytes(coarse.flatten().tolist()))
        soft = soft.resize(size, Image.Resampling.BICUBIC)
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
    model = peer_model(row, machine)
    length, targets = (TINY_LENGTHS[n] if machine.tiny else n for n in (row.length, TARGETS))
    batch = random_batch(build_model(model_config(machine)), row, length, targets)
    labels = batch.input_ids.clone()
    labels[:, : length - targets] = IGNORE_INDEX
    pixel_values = batch.images.pixel_values.to(machine.dtype)
    given = {"input_ids": batch.input_ids, "labels": labels, "pixel_values": pixel_values}
    given = {name: tensor.to(machine.device) for name, tensor in given.items()}
    use_attention("default")  # PyTorch's own choice, whatever the rows before measured as best
    loss = partial(peers.autocast_loss, model, machine, **given)
    return peers.train_on(model, loss, machine, steps=steps, tokens=row.batch * length)


def peer_model(row: Row, machine: Machine) -> nn.Module:
    """Random weights made on the device, no files."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    torch.manual_seed(0)
    config = model_config(machine)
    parts = {"text_config": LlamaConfig(**config["text_config"], use_cache=False)}
    parts |= {"vision_config": CLIPVisionConfig(**config["vision_config"])}
    config = LlavaConfig(**parts, image_token_index=config["image_token_index"])
    with machine.device:
        model = AutoModelForImageTextToText.from_config(config, dtype=machine.dtype, attn_implementation="sdpa")
    blocks = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    targets = rf".*language_model.*\.({'|'.join(ALL_LINEAR)})"
    return peers.put_lora(model, blocks, row, machine, target_modules=targets)
