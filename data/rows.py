"""A row of data as tokens and targets: which of its tokens are trained, by its format (data/row_formats.py)."""

import re
from dataclasses import dataclass
from functools import lru_cache

from data.chat.contents import PLACEHOLDER, texts_of
from data.chat.targets import special_token_pattern
from data.chat.templates import TRAIN_ON, ChatTemplate
from data.images.files import ImageFiles
from data.row_formats import Chat, Completion, Text, parse_row
from data.tokenizers.load import Tokenizer
from modules.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Encoded:
    """`targets[i]` is the token to be predicted at position i: `input_ids[i + 1]` if that is trained, else -100."""

    input_ids: list[int]
    targets: list[int]
    special: str | None = None  # a special token written out in the row's own words, if there is one
    unended: bool = False  # some trained message has no end-of-turn token
    chat: bool = False  # rendered by the chat template
    images: tuple[str, ...] = ()  # image files, as the row names them, in the order of their tokens
    images_end: int = 0  # position after the last image: a row must not be cut before it


def encode_row(
    row: dict,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    train_on: str = "assistant",
    prompt_field: str | None = None,
    completion_field: str | None = None,
    on_special_content: str = "keep",
    image_files: ImageFiles | None = None,
) -> Encoded:
    """Tokens and targets of one row; both lists have one length. Raises ValueError if the row is bad.

    `train_on`: "assistant", "last" (assistant message) or "all" (every token after the first). The caller drops and
    counts rows without a target. With `image_files` rows may have images: the processor expands their <image> tokens,
    which are no targets. Raises BadImage for an unusable file.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"--train-on {train_on!r} is not one of {', '.join(TRAIN_ON)}")
    parsed = parse_row(row, prompt_field, completion_field, with_images=image_files is not None)
    special, unended = None, False
    match parsed:
        case Text(text):
            # Special tokens are no surprise here: a text may contain its own chat markup.
            ids = tokenizer.encode_prompt(text) + [_eos(tokenizer)]
            trained = [True] * len(ids)
        case Completion(prompt, completion):
            words = [prompt, completion]
            if parsed.images:
                words = [text.replace(PLACEHOLDER, "") for text in words]
            special = _special_in(words, tokenizer, on_special_content)
            prompt_ids = tokenizer.encode_prompt(prompt)
            completion_ids = tokenizer.encode(completion) + [_eos(tokenizer)]
            trained = [train_on == "all"] * len(prompt_ids) + [True] * len(completion_ids)
            ids = prompt_ids + completion_ids
        case Chat(messages, first, tools):
            if template is None:
                fix = "choose one with --chat-format llama2, llama3, chatml, vicuna or FILE.jinja"
                raise ValueError(f"a chat row, but this checkpoint has no chat template; {fix}")
            contents = [text for message in messages for text in texts_of(message["content"])]
            special = _special_in(contents, tokenizer, on_special_content)
            rendered = template.render_with_targets(messages, train_on, first=first, tools=tools)
            # As in transformers: the template writes everything, no BOS or EOS is added.
            ids, token_spans = tokenizer.encode_with_spans(rendered.text)
            trained = _overlaps(token_spans, rendered.spans, len(rendered.text))
            unended = rendered.unended > 0
            # A processor of text and images does add BOS, and LLaVA's own template relies on that.
            if image_files is not None and tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
                ids, trained = [tokenizer.bos_id, *ids], [False, *trained]
    images_end = 0
    if image_files is not None:
        processor, unexpanded = image_files.processor, ids
        ids, places = processor.expand(unexpanded, parsed.images, image_files.check, tokenizer)
        stands_for_image = [unexpanded[i] == processor.token_id for i in places]
        trained = [trained[i] and not of_image for i, of_image in zip(places, stands_for_image, strict=True)]
        if parsed.images:
            images_end = len(ids) - stands_for_image[::-1].index(True)
    is_chat = isinstance(parsed, Chat)
    return Encoded(ids, _targets(ids, trained), special, unended, is_chat, parsed.images, images_end)


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no EOS token to end a text with; set eos_token in tokenizer_config.json")
    return tokenizer.eos_id


def _overlaps(token_spans: list[tuple[int, int]], spans: list[tuple[int, int]], length: int) -> list[bool]:
    """For each token, whether any of its characters is trained."""
    trained = bytearray(length)
    for start, end in spans:
        trained[start:end] = b"\1" * (end - start)
    # SentencePiece may put a bare "▁" before a word, over no characters: it belongs to the word's first one.
    return [trained.find(1, start, max(end, start + 1)) >= 0 for start, end in token_spans]


def _targets(ids: list[int], trained: list[bool]) -> list[int]:
    """The token after each position, where that token is trained."""
    after = [token if wanted else IGNORE_INDEX for token, wanted in zip(ids[1:], trained[1:], strict=True)]
    return [*after, IGNORE_INDEX] if ids else []


def _special_in(texts: list[str], tokenizer: Tokenizer, on_special_content: str) -> str | None:
    pattern = _special_pattern(frozenset(tokenizer.control_tokens))
    found = next((match[0] for match in map(pattern.search, texts) if match), None)
    if found and on_special_content == "error":
        raise ValueError(f"the row's own text holds the special token {found!r} (--on-special-content keep allows it)")
    return found


@lru_cache(maxsize=8)
def _special_pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    return re.compile(special_token_pattern(tokens))
