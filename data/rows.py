"""What a row of data may look like, and its tokens and targets.

A row is one of these (the first that fits; null counts as absent):

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}      ShareGPT
    {"prompt": "…", "completion": "…"}          or the columns named by --prompt-field and --completion-field
    {"instruction": "…", "input": "…", "output": "…"}                                        alpaca; input may be absent
    {"text": "…"}

`prompt` and `completion` may both be lists of messages: then they are one chat, of which the completion is trained.
For a vision-language model all of them may have images (data/image_rows.py).
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from data.chat_contents import IMAGE, PLACEHOLDER, Content, texts_of
from data.chat_targets import special_token_pattern
from data.chat_templates import TRAIN_ON, ChatTemplate
from data.image_files import ImageFiles
from data.image_rows import RowImages
from data.json_rows import shown
from data.tokenizers import Tokenizer
from modules.loss import IGNORE_INDEX

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}

# Word for word from github.com/tatsu-lab/stanford_alpaca (train.py).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Chat:
    messages: list[dict]
    first: int = 0
    """Number of the first message that may be trained."""
    tools: list | None = None
    images: tuple[str, ...] = ()
    """Image files in the order in which they stand in the text; of the other two formats, too."""


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    text: str
    images: tuple[str, ...] = ()


def parse_row(
    row: dict, prompt_field: str | None = None, completion_field: str | None = None, with_images: bool = False
) -> "Chat | Completion | Text":
    """A row of any format as one of three. Raises ValueError (without file and line, which only the caller knows)."""
    images = RowImages(row) if with_images else None
    parsed = _parse(row, prompt_field, completion_field, images)
    return replace(parsed, images=images.files) if images else parsed


def _parse(
    row: dict, prompt_field: str | None, completion_field: str | None, images: RowImages | None
) -> "Chat | Completion | Text":
    has = {key for key, value in row.items() if value is not None}
    prompt, completion = prompt_field or "prompt", completion_field or "completion"
    if prompt_field or completion_field:
        if not {prompt, completion} <= has:
            raise ValueError(f"the row has no {prompt!r} and {completion!r}; it has {_listed(row)}")
    elif "messages" in has:
        return Chat(_messages(row["messages"], "messages", images), tools=_tools(row))
    elif "conversations" in has:
        return Chat(_messages(row["conversations"], "conversations", images), tools=_tools(row))
    if {prompt, completion} <= has:
        if isinstance(row[prompt], list) and isinstance(row[completion], list):
            before = _messages(row[prompt], prompt, images)
            after = _messages(row[completion], completion, images)
            return Chat(before + after, first=len(before), tools=_tools(row))
        return Completion(_string(row[prompt], prompt), _string(row[completion], completion))
    if {"instruction", "output"} <= has:
        fields = {key: _string(row[key], key) for key in ("instruction", "input") if key in has}
        form = ALPACA_WITH_INPUT if fields.get("input") else ALPACA_WITHOUT_INPUT
        return Completion(form.format(**fields), _string(row["output"], "output"))
    if "text" in has:
        return Text(_string(row["text"], "text"))
    raise ValueError(
        f"unknown row format: it has {_listed(row)}; expected messages, conversations, prompt + completion, "
        "instruction + output or text (other column names: --prompt-field and --completion-field)"
    )


def _messages(found: object, key: str, images: RowImages | None) -> list[dict]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{key!r} must be a list of messages with at least one, got {shown(found)}")
    return [_message(message, f"{key}[{i}]", images) for i, message in enumerate(found)]


def _message(message: object, where: str, images: RowImages | None) -> dict:
    """{"role", "content"} and whatever else the row gives the template, from either spelling."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object with role and content, got {shown(message)}")
    sharegpt = "from" in message
    role_key, content_key, roles = ("from", "value", SHAREGPT_ROLES) if sharegpt else ("role", "content", ROLES)
    if role_key not in message:
        raise ValueError(f"{where} has no role; it has {_listed(message)}")
    role, content = message[role_key], message.get(content_key)
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"unknown role {shown(role)} in {where}; known are {', '.join(roles)}")
    if isinstance(content, list):
        content = _content(content, where, images)
    elif content is not None or not message.get("tool_calls"):  # a message may be nothing but tool calls
        content = _string(content, f"{where}.{content_key}")
        content = images.string(content) if images else content
    if isinstance(content, list) and roles[role] == "assistant":
        raise ValueError(f"{where} is an assistant message with an image in it: these models read images, only")
    more = {key: value for key, value in message.items() if key not in (role_key, content_key)}
    return {**more, "role": roles[role], "content": content}


def _content(found: list, where: str, images: RowImages | None) -> Content:
    """A list of parts as one string or, where there are images among them, as a list of texts and images."""
    parts: list[dict] = []
    for part in found:
        is_image = isinstance(part, dict) and part.get("type") in ("image", "image_url")
        if is_image and images is None:
            raise ValueError(f"{where} holds an image; these recipes train on text only")
        new = images.part(part, where) if is_image else _text_part(part, where)
        new = images.string(new) if images and isinstance(new, str) else new
        parts += new if isinstance(new, list) else [new] if new == IMAGE else [{"type": "text", "text": new}]
    return parts if IMAGE in parts else "".join(part["text"] for part in parts)


def _text_part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f'{where}.content: a part must be {{"type": "text", "text": …}}, got {shown(part)}')
    return _string(part.get("text"), f"{where}.content text")


def _tools(row: dict) -> list | None:
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list of JSON schemas, got {shown(tools)}")
    return tools


def _string(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a character: \\u{ord(value[error.start]):04x} without its other half"
        ) from None
    return value


def _listed(row: dict) -> str:
    return ", ".join(f"{key!r}{' (null)' if value is None else ''}" for key, value in row.items()) or "no keys"


@dataclass(frozen=True)
class Encoded:
    """`targets[i]` is the token to be predicted at position i: `input_ids[i + 1]` if that is trained, else -100."""

    input_ids: list[int]
    targets: list[int]
    special: str | None = None
    """A special token written out in the row's own words, if there is one."""
    unended: bool = False
    """Some trained message has no end-of-turn token."""
    chat: bool = False
    """Rendered by the chat template."""
    images: tuple[str, ...] = ()
    """Image files, as the row names them, in the order of their tokens."""
    images_end: int = 0
    """Number of the position behind the last image: a row must not be cut before it."""


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

    `train_on`: "assistant", "last" (assistant message) or "all" (every token after the first). A row may come out
    without any target: the caller drops and counts it. With `image_files` rows may have images: their <image> tokens
    become what their processor makes of them, and none of that is a target. Raises BadImage for an unusable file.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"--train-on {train_on!r} is not one of {', '.join(TRAIN_ON)}")
    parsed = parse_row(row, prompt_field, completion_field, with_images=image_files is not None)
    special, unended = None, False
    match parsed:
        case Text(text):
            # Here a special token is not a surprise: who writes whole texts may write them with their frame.
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
                raise ValueError(
                    "a chat row, but this checkpoint has no chat template; choose one with --chat-format "
                    "llama2, llama3, chatml, vicuna or FILE.jinja"
                )
            contents = [text for message in messages for text in texts_of(message["content"])]
            special = _special_in(contents, tokenizer, on_special_content)
            rendered = template.render_with_targets(messages, train_on, first=first, tools=tools)
            # As transformers does with a chat: what the template wrote is all, no BOS or EOS is added.
            ids, token_spans = tokenizer.encode_with_spans(rendered.text)
            trained = _overlaps(token_spans, rendered.spans, len(rendered.text))
            unended = rendered.unended > 0
            # A processor of text and images does add it, and LLaVA's own template relies on that.
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
