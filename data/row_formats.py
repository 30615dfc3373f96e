"""What a row of data may look like.

A row is one of these (the first that fits; null counts as absent):

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}      ShareGPT
    {"prompt": "…", "completion": "…"}          or the columns named by --prompt-field and --completion-field
    {"instruction": "…", "input": "…", "output": "…"}                                        alpaca; input may be absent
    {"text": "…"}

`prompt` and `completion` may both be lists of messages: then they are one chat, of which the completion is trained.
For a vision-language model all of them may have images (data/images/rows.py).
"""

from dataclasses import dataclass, replace

from data.chat.contents import IMAGE, Content
from data.images.rows import RowImages
from data.json_rows import shown

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES = ROLES | {"human": "user", "observation": "tool"}
SHAREGPT_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")

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
    first: int = 0  # number of the first message that may be trained
    tools: list | None = None
    images: tuple[str, ...] = ()  # image files in the order in which they stand in the text


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
    if not (with_images or prompt_field or completion_field) and (row.get("image") or row.get("images")):
        raise ValueError("the row has an image; these recipes train on text only (vlm_finetune.py reads images)")
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
            both = "" if prompt_field and completion_field else ": give --prompt-field and --completion-field"
            raise ValueError(f"the row has no {prompt!r} and {completion!r}; it has {_listed(row)}{both}")
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
    """{"role", "content"} and any further keys for the template, from either spelling."""
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
    """A list of parts as one string or, if it has images, as a list of texts and images."""
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
        half = f"\\u{ord(value[error.start]):04x}"
        raise ValueError(f"{what} holds half a character: {half} without its other half") from None
    return value


def _listed(row: dict) -> str:
    return ", ".join(f"{key!r}{' (null)' if value is None else ''}" for key, value in row.items()) or "no keys"
