"""Which characters of a rendered conversation are trained.

A chat template is a program that turns messages into one string and does not say where each went. Searching for the
answers would be wrong sooner or later: "a" is everywhere, and an answer may repeat a header. Instead the conversation
is rendered again with marks in place of the contents, and the two texts are compared.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

REASONING = ("reasoning_content", "thinking", "reasoning")  # spellings of one field, the standard one first

# A mark stands for a message's content: private-use characters, which no template writes, changes or strips.
MARK, MARKS = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")

Render = Callable[..., str]  # messages, add_generation_prompt=False -> text; ValueError where the template refuses


@dataclass(frozen=True)
class Place:
    """Where message number `message` lies in the text: [start, end). At `stop` the next content begins."""

    message: int
    start: int
    end: int
    stop: int


def find_messages(render: Render, messages: Sequence[dict], wanted: Sequence[int], text: str) -> list[Place]:
    """The places in `text`, which is `render(messages)`, of the messages whose numbers are `wanted`.

    A message that the template leaves out has none. Raises ValueError if the template rewrites messages so that
    they cannot be told from its own words.
    """
    more_than_content = any(messages[i].get(key) for i in wanted for key in (*REASONING, "tool_calls"))
    places = None if more_than_content else _compare_all(render, messages, text)
    if places is None:
        return [_compare_one(render, messages, i, text) for i in wanted]
    return [place for place in places if place.message in wanted]


def _compare_all(render: Render, messages: Sequence[dict], text: str) -> list[Place] | None:
    """Mark all contents (but those with images, which are not trained) at once; None if the template does more with a
    content than to strip it.

    What it writes around the marks are its own words. The contents put between them must give the real text to the
    letter, so a place that is returned is right.
    """
    marked = [
        message | {"content": MARK.format(i)} if isinstance(message.get("content"), str) else message
        for i, message in enumerate(messages)
    ]
    try:
        words, *rest = MARKS.split(render(marked))  # words, number, words, number, …, words
    except ValueError:
        return None  # it looks into the contents and does not like the marks
    if not text.startswith(words):
        return None
    places, start = [], len(words)
    for i, words in zip(map(int, rest[::2]), rest[1::2], strict=True):
        content = messages[i]["content"]
        for shape in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(shape + words, start):
                break
        else:
            return None
        end = start + len(shape)
        places.append(Place(i, start, end, end + len(words)))
        start = end + len(words)
    return places if start == len(text) else None


def _compare_one(render: Render, messages: Sequence[dict], i: int, text: str) -> Place:
    """Mark message i alone, for templates that rewrite contents or add to them (thinking, tool calls).

    The message is then all that the template makes of it. It begins where the generation prompt ends, since that is
    where a model takes over; without one, where the text begins to depend on it. It ends where the words behind the
    mark begin.
    """
    marked = [*messages[:i], {"role": messages[i]["role"], "content": MARK.format(i)}, *messages[i + 1 :]]
    try:
        before, found, behind = render(marked).rpartition(MARK.format(i))
    except ValueError:
        before = found = behind = ""
    end = len(text) - len(behind)
    start = _generation_start(render, messages[:i], text) or len(os.path.commonprefix([before, text]))
    if not found or not text.endswith(behind) or start > end:
        raise ValueError(
            f"the chat template rewrites the messages, so that the text of message {i + 1} cannot be told from its own "
            "words; use prompt/completion rows, --train-on all or another --chat-format"
        )
    return Place(i, start, end, len(text))


def _generation_start(render: Render, before: Sequence[dict], text: str) -> int | None:
    """Where the generation prompt after the messages `before` ends, if the template has one."""
    try:
        asked = render(before, add_generation_prompt=True)
        return len(asked) if text.startswith(asked) and asked != render(before) else None
    except ValueError:
        return None  # some templates cannot render an empty conversation


class TurnEnds:
    """Finds the end-of-turn token after a content: a special token with only whitespace between."""

    def __init__(self, special_tokens: Iterable[str], bos: str, eos: str):
        special = special_token_pattern({*special_tokens, bos, eos})
        self._behind = re.compile(rf"\s*({special})")
        self._opening = re.compile(rf"(?:{re.escape(bos)})?\s*({special})")
        self._bos, self._eos = bos, eos

    def find(self, text: str, place: Place) -> tuple[int, int] | None:
        """Characters [start, end) of the token; None if the next turn opens, or the text ends, without one."""
        match = self._behind.match(text, place.end, place.stop)
        opening = self._opening.match(text)  # what opens the first turn opens the others, too
        if match is None or match[1] == self._eos:  # some tokenizers have one token for BOS and EOS
            return match and match.span(1)
        return None if match[1] in (self._bos, opening and opening[1]) else match.span(1)


def special_token_pattern(tokens: Iterable[str]) -> str:
    """A regular expression for any of the tokens, longest first; for none of them, one that never matches."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or "(?!)"
