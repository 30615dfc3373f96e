"""Chat templates: from a list of messages to the one string a chat model was trained on, and which of it to train.

A checkpoint carries its format as a jinja2 program, in `chat_template.jinja` or inside `tokenizer_config.json`. It is
untrusted code, so it runs in jinja2's sandbox, with the settings, names and values that transformers gives it:
the text must come out equal to the letter. For base models without one, data/chat/formats.py has the well-known ones.

Where each message went, and so what is trained, is found out in data/chat/targets.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.chat.contents import PLACEHOLDER, as_parts, as_string, takes_parts, takes_strings
from data.chat.formats import TEMPLATES
from data.chat.targets import REASONING, TurnEnds, find_messages
from data.json_rows import read_json
from data.tokenizers.added_tokens import NAMED, content_of
from data.tokenizers.load import Tokenizer

TRAIN_ON = ("assistant", "last", "all")


@dataclass(frozen=True)
class Rendered:
    text: str
    spans: list[tuple[int, int]]
    """Characters [start, end) that are trained, in order: contents and end-of-turn tokens."""
    unended: int = 0
    """Trained messages without an end-of-turn token: from them a model never learns to stop."""


class ChatTemplate:
    """A compiled template. `name` says where it came from; `now` is the date that it may print.

    The date is fixed when the template is loaded (a run that passes midnight keeps it); a resumed run hands in the
    one it began with.
    """

    def __init__(
        self,
        source: str,
        name: str,
        variables: dict[str, str | bool],
        special_tokens: Sequence[str] = (),
        now: datetime | None = None,
    ):
        self.source, self.name, self.now = source, name, now or datetime.now()
        self.variables = variables
        try:
            self._template = _environment(self.now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template ({name}) is not valid jinja: line {error.lineno}: {error}") from None
        self._turn_ends = TurnEnds(special_tokens, variables.get("bos_token", ""), variables.get("eos_token", ""))

    def render(self, messages: Sequence[dict], *, add_generation_prompt: bool = False, tools=None) -> str:
        """The conversation as text, as transformers' `apply_chat_template(tokenize=False)` gives it.

        A content is a string or, if it has images, a list of {"type": "text", "text": …} and {"type": "image"}; the
        template is given whichever of the two it reads. Raises ValueError with the template's own words where it
        refuses the conversation.
        """
        reads_strings, reads_parts = self._reads
        messages = list(messages)
        for i, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list) or not reads_strings:
                messages[i] = message | {"content": as_parts(content) if reads_parts else as_string(content)}
        return self._render(messages, add_generation_prompt, tools)

    @cached_property
    def _reads(self) -> tuple[bool, bool]:
        """Whether the template reads contents that are strings, and contents that are lists of parts."""
        return takes_strings(self._render), takes_parts(self._render)

    def _render(self, messages: Sequence[dict], add_generation_prompt: bool = False, tools=None) -> str:
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # untrusted code: besides raise_exception it may fail in any way
            words = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"the chat template ({self.name}) refuses this conversation: {words}") from None

    def render_with_targets(
        self, messages: Sequence[dict], train_on: str = "assistant", *, first: int = 0, tools=None
    ) -> Rendered:
        """The text and what of it is trained: the content and the end-of-turn token of assistant messages.

        `train_on`: "assistant" takes all of them (from message number `first` on), "last" the last, "all" the whole
        text. Characters that the template puts between a content and its end-of-turn token are not trained. Raises
        ValueError if the template changes contents so that they cannot be found again.
        """
        if train_on not in TRAIN_ON:
            raise ValueError(f"--train-on {train_on!r} is not one of {', '.join(TRAIN_ON)}")
        text = self.render(messages, tools=tools)
        if train_on == "all":
            return Rendered(text, [(0, len(text))])
        trained = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
        if train_on == "last":
            trained = trained[-1:]

        spans, unended = [], 0
        for place in find_messages(partial(self.render, tools=tools), messages, trained, text):
            spans.append((place.start, place.end))
            if end_of_turn := self._turn_ends.find(text, place):
                spans.append(end_of_turn)
            else:
                unended += 1
        return Rendered(text, spans, unended)


def load_chat_template(
    folder: str | Path,
    tokenizer: Tokenizer,
    name: str = "auto",
    extra_folder: str | Path | None = None,
    now: datetime | None = None,
) -> ChatTemplate | None:
    """The template that `--chat-format NAME` means for a checkpoint folder; None where "auto" finds none.

    "own": the one in `extra_folder` (an adapter's) or `folder`. "auto": that, else the written-out format whose special
    tokens the tokenizer has. Otherwise a key of TEMPLATES or a .jinja file. Raises ValueError for an unknown name.
    """
    variables: dict[str, str | bool] = _named_tokens(Path(folder), tokenizer)
    special = [token for token in tokenizer.special_tokens if token.strip()]  # some are mere runs of spaces
    if name in ("own", "auto"):
        for place, whose in ((extra_folder, "the adapter's own"), (folder, "the checkpoint's own")):
            source = _read_own_template(Path(place)) if place is not None else None
            if source is not None:
                return ChatTemplate(source, whose, variables, special, now)
        fitting = None if name == "own" else _format_that_fits(tokenizer, variables)
        if fitting is None:
            return None
        name = fitting
    if name in TEMPLATES:
        source = TEMPLATES[name]
        if name == "chatml" and tokenizer.adds_bos:
            source = "{{ bos_token }}" + source
        return ChatTemplate(source, name, {"bos_token": "", "eos_token": "", **variables}, special, now)
    check_chat_format(name)
    return ChatTemplate(Path(name).read_text(encoding="utf-8"), Path(name).name, variables, special, now)


def check_chat_format(name: str) -> None:
    if name not in ("own", "auto", *TEMPLATES) and not Path(name).is_file():
        raise ValueError(f"--chat-format {name!r} is neither a file nor one of auto, {', '.join(TEMPLATES)}")


def stop_token_ids(folder: str | Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> set[int]:
    """Tokens that end a generated text: the checkpoint's EOS tokens, and what ends an assistant's turn in `template`.

    A base model's own files know nothing of the turns that it is about to learn.
    """
    found = {tokenizer.eos_id}
    for file in ("config.json", "generation_config.json"):
        ids = read_json(Path(folder) / file).get("eos_token_id")
        found |= set(ids if isinstance(ids, list) else [ids])
    if template is not None:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        rendered = template.render_with_targets(turns)
        found |= {tokenizer.id_of(rendered.text[start:end]) for start, end in rendered.spans[1:]}
    return found - {None}


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what transformers may train. Here it only has to parse."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        # A scope, since in transformers a variable set inside is not seen outside.
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for templates."""
    extensions = [_GenerationTag, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter would write <, > and & as escapes: it is meant for web pages.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    return environment


def _plain(message: dict) -> dict:
    """A message as transformers shows it to a template: null values left out, one name for the reasoning."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _read_own_template(folder: Path) -> str | None:
    """The template a folder holds: chat_template.jinja, a processor's, or the (default) one of the tokenizer."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if own := read_json(folder / "chat_template.json").get("chat_template"):  # vision-language models until 2025
        return own
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # [{"name": …, "template": …}, …]
        named = {entry["name"]: entry["template"] for entry in found}
        if "default" not in named:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} holds the chat templates {', '.join(named)} but no default; "
                "save the one you want in a file and give --chat-format FILE.jinja"
            )
        found = named["default"]
    return found


def _format_that_fits(tokenizer: Tokenizer, variables: dict) -> str | None:
    if "<|start_header_id|>" in tokenizer.special_tokens:
        return "llama3"
    if "<|im_start|>" in tokenizer.special_tokens:
        return "chatml"
    if (variables.get("bos_token"), variables.get("eos_token")) == ("<s>", "</s>"):
        return "llava" if PLACEHOLDER in tokenizer.special_tokens else "llama2"
    return None


def _named_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token`, `eos_token` … as a template sees them, by the folder's files."""
    config = read_json(folder / "tokenizer_config.json")
    files = read_json(folder / "special_tokens_map.json") | config
    found = {key: content_of(files.get(key)) for key in NAMED}
    # A token that the files leave out is the tokenizer's own, except that transformers' general class has none.
    if config.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        for key, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            if key not in files and token_id is not None:
                found[key] = tokenizer.token_of(token_id)
    return {key: value for key, value in found.items() if value is not None}
