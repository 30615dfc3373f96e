"""A folder with the processor of a tiny SmolVLM as transformers saves it."""

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from transformers import AddedToken, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from data.chat.templates import load_chat_template
from data.images.load import load_image_processor
from data.tokenizers.load import load_tokenizer
from tests.data.tiny_tokenizer import train

TILE, PATCH, SCALE, LONGEST = 16, 4, 2, 48  # 4 × 4 patches, 4 tokens of a tile; up to 3 × 3 tiles
TOKENS = (TILE // PATCH // SCALE) ** 2

# HuggingFaceTB/SmolVLM-256M-Instruct, to the letter.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MARKS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
# One row of marks is missing: such a tile is marked with plain words, as in Idefics3's tokenizer all are.
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 4))


@cache
def smolvlm_processor(split: bool = True) -> Idefics3Processor:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(train()), bos_token="<|im_start|>", eos_token="<end_of_utterance>"
    )
    added = [AddedToken(token, special=True, normalized=False) for token in MARKS + PLACES]
    fast.add_tokens(added, special_tokens=True)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": LONGEST}, max_image_size={"longest_edge": TILE}, do_image_splitting=split
    )
    return Idefics3Processor(images, fast, image_seq_len=TOKENS, chat_template=SMOLVLM)


def config(**overrides) -> dict:
    vision = {"model_type": "idefics3_vision", "image_size": TILE, "patch_size": PATCH}
    token = smolvlm_processor().image_token_id
    own = {"model_type": "idefics3", "vision_config": vision, "image_token_id": token, "scale_factor": SCALE}
    return own | overrides


@cache
def folder(split: bool = True) -> Path:
    path = Path(mkdtemp())
    smolvlm_processor(split).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config()))
    return path


@cache
def parts(chat_format: str = "auto", split: bool = True) -> tuple:
    """(tokenizer, template, image processor) of the folder."""
    tokenizer = load_tokenizer(folder(split))
    template = load_chat_template(folder(split), tokenizer, chat_format)
    return tokenizer, template, load_image_processor(folder(split), config())
