"""Added tokens: what is found in a text before anything else happens to it, above all the special tokens.

Every line follows `AddedVocabulary` of the `tokenizers` library.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken

from data.json_rows import read_json
from data.tokenizers.byte_level_bpe import WHITE_SPACE

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before it is normalised or split; the fields are tokenizer.json's."""

    content: str
    id: int
    special: bool = True  # left out when decoding
    normalized: bool = False  # looked for in the normalized text
    lstrip: bool = False  # swallows the white space before it
    rstrip: bool = False  # … and behind it
    single_word: bool = False  # only where no letter or digit touches it


class Finder:
    """Cuts a text at added tokens: leftmost first, the longest where several begin, as `tokenizers` does."""

    def __init__(self, tokens: dict[str, AddedToken]):
        self.tokens = tokens
        longest_first = sorted((content for content in tokens if content), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def split(self, text: str) -> Iterator[tuple[int, int, AddedToken | None]]:
        """Consecutive (start, end, token or None), none of them empty."""
        done = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            token, start, stop = self.tokens[match[0]], match.start(), match.end()
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(_SPACES)))
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(_SPACES))
            if done < start:
                yield done, start, None
            yield start, stop, token
            done = stop
        if done < len(text):
            yield done, len(text), None


def _is_word(char: str) -> bool:
    """Whether a character is `\\w`, which the three regex engines at hand define differently; "" is not."""
    return bool(_WORD.encode_ordinary(char))


_WORD = tiktoken.Encoding("", pat_str=r"\w", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
_SPACES = "".join(chr(i) for i in range(0x3001) if re.match(f"[{WHITE_SPACE}]", chr(i)))


def with_tokens_of_config(
    added: list[AddedToken], vocab: dict[str, int], folder: Path, config: dict, names: dict[str, str | None]
) -> list[AddedToken]:
    """`added`, and the tokens that only the other files know: listed with their ids, or only named.

    `names` are the named tokens (bos_token …); whatever has a role is special, whatever it is listed as.
    """
    found = {token.content: token for token in added}
    flags = ("normalized", "lstrip", "rstrip", "single_word")
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [config.get(name) if content_of(config.get(name)) else names[name] for name in NAMED]
    named = [token for token in [*named, *extra] if content_of(token)]
    if not listed:  # the older way: added_tokens.json, in which only the named ones are special
        special = {content_of(token) for token in named}
        for content, i in read_json(folder / "added_tokens.json").items():
            plain = content not in special
            listed[i] = {"content": content, "special": not plain, "normalized": plain}

    for i, token in sorted(listed.items()):
        options = {key: token.get(key, False) for key in (*flags, "special")}
        new = AddedToken(token["content"], vocab.get(token["content"], i), **options)
        found.setdefault(new.content, new)
    for token in named:
        content = content_of(token)
        if content in found:
            found[content] = replace(found[content], special=True)
        else:
            # A token that has no id yet gets the next one, which is where transformers puts it, too.
            free = max([*vocab.values(), *(t.id for t in found.values())]) + 1
            options = {key: token.get(key, False) for key in flags} if isinstance(token, dict) else {}
            found[content] = AddedToken(content, vocab.get(content, free), **options)
    return list(found.values())


def content_of(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
