"""A LLaVA of real shape with random weights, and rows with an image: what recipes/benchmarks/vlm.py trains."""

import torch
from torch import nn

from checkpointing.pretrained import put_weight
from data.batches import Batch
from data.dataset import TokenizedDataset
from data.dataset_report import DatasetReport
from models import build_model
from models.llava import PRESETS
from modules.adapters.lora import add_lora
from modules.adapters.vlm_parts import name_in_language_model
from modules.attention import padded_layout
from modules.loss import IGNORE_INDEX
from modules.memory.host_embedding import keep_embedding_on_host
from modules.memory.weight_streaming import StreamedWeights, stream_weights
from recipes.benchmarks.measure import TINY, Machine, Row

PRESET = "llava-1.5-7b"
TINY_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TINY_VISION |= dict(image_size=28, patch_size=14)


def model_config(machine: Machine) -> dict:
    """The preset's config.json."""
    config = PRESETS[PRESET] | {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    if machine.tiny:
        text = config["text_config"] | TINY | {"num_key_value_heads": TINY["num_attention_heads"]}
        vision = config["vision_config"] | TINY_VISION
        config |= {"text_config": text, "vision_config": vision, "image_token_index": TINY["vocab_size"] - 1}
    return config


def random_model(row: Row, machine: Machine) -> tuple[nn.Module, StreamedWeights | None]:
    """Random weights made on the device, as recipes/benchmarks/measure.py makes a Llama's."""
    torch.manual_seed(0)  # for the adapters
    generator = torch.Generator(machine.device).manual_seed(0)
    model = build_model(model_config(machine)).requires_grad_(False)
    language = model.language_model
    if row.quantize == "nf4":
        from modules.quantization.nf4 import quantize_nf4  # torchao takes seconds to import

        quantize_nf4(model.vision_tower)
        quantize_nf4(language, head=row.quantize_head)
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
            streamed.take(name_in_language_model(model, name))
    linears = [name for name, m in language.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    add_lora(language, targets=linears, rank=row.rank, alpha=2.0 * row.rank)
    return model.train(), streamed


def random_batch(model: nn.Module, row: Row, length: int, targets: int | None) -> Batch:
    """Rows of a token, one image and text, on the CPU; the last `targets` tokens of each are trained, or all text."""
    dataset = random_rows(model, row.batch, length, targets)
    rows = [dataset[i] for i in range(row.batch)]
    input_ids, wanted = (torch.stack(columns).long() for columns in zip(*rows, strict=True))
    index = (wanted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    places = (input_ids.flatten() == model.config.image_token).nonzero().squeeze(1)
    vision = model.config.vision
    shape = (row.batch, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return Batch(input_ids, padded_layout(length), index, wanted.flatten()[index], pixels, places)


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
