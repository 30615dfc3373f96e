"""Drawn pictures, and a folder with the processor of a tiny LLaVA as transformers saves it."""

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import tokenizers
from PIL import Image
from transformers import AddedToken, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from data.chat.templates import load_chat_template
from data.images.load import load_image_processor
from data.tokenizers.load import load_tokenizer
from tests.data.tiny_tokenizer import train

SIDE, PATCH, TOKENS = 28, 14, 4

# llava-hf/llava-1.5-7b-hf, to the letter.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@cache
def llava_processor() -> LlavaProcessor:
    tokenizer = copy.deepcopy(train())
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )


def config(**overrides) -> dict:
    vision = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH}
    token = llava_processor().image_token_id
    return {"model_type": "llava", "vision_config": vision, "image_token_index": token} | overrides


@cache
def folder() -> Path:
    path = Path(mkdtemp())
    llava_processor().save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config()))
    return path


@cache
def parts(chat_format: str = "auto") -> tuple:
    """(tokenizer, template, image processor) of the folder."""
    tokenizer = load_tokenizer(folder())
    return tokenizer, load_chat_template(folder(), tokenizer, chat_format), load_image_processor(folder(), config())


def draw(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Waves of colour, so that every pixel and each channel counts."""
    bands = []
    for band in range(len(Image.new(mode, (1, 1)).getbands())):
        ramp = bytes(
            (x * (3 + band) + y * (7 - band) + 40 * seed + (x * y) % 11) % 256
            for y in range(height)
            for x in range(width)
        )
        bands.append(Image.frombytes("L", (width, height), ramp))
    return bands[0].convert(mode) if len(bands) == 1 else Image.merge(mode, bands)
