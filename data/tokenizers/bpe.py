"""What the tokenizers share: the merge loop of byte-pair encoding, and turning tokens back into text.

Both follow the `tokenizers` library to the letter, because a model only knows the ids it was trained on.
"""

import heapq
import re

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[tuple[str, int, int]]:
    """Join neighbouring symbols, lowest rank first and leftmost first among equals, until no rule applies.

    Returns (token, first, last + 1) with indices into `symbols`. O(n log n), so a megabyte without a space is
    seconds, not hours. Sennrich et al., arXiv:1508.07909.
    """
    tokens: list[str | None] = list(symbols)  # None: swallowed by a token to its left
    end = list(range(1, len(symbols) + 1))  # end[i]: where token i stops, which is where its neighbour starts
    start = list(range(-1, len(symbols)))  # start[j]: the token that stops at j; start[0]: none

    queue = []
    for i in range(len(symbols) - 1):
        rank = ranks.get((symbols[i], symbols[i + 1]))
        if rank is not None:
            queue.append((rank, i))
    heapq.heapify(queue)

    while queue:
        rank, i = heapq.heappop(queue)
        j = end[i]
        # An entry is stale once either of its two tokens has become part of another one.
        if tokens[i] is None or j == len(symbols) or ranks.get((tokens[i], tokens[j])) != rank:
            continue
        tokens[i] += tokens[j]
        tokens[j] = None
        end[i] = end[j]
        start[end[i]] = i
        for left in (start[i], i):
            right = end[left] if left >= 0 else len(symbols)
            if right < len(symbols):
                rank = ranks.get((tokens[left], tokens[right]))
                if rank is not None:
                    heapq.heappush(queue, (rank, left))

    return [(token, i, end[i]) for i, token in enumerate(tokens) if token is not None]


def read_merges(model: dict, where: str) -> list[tuple[str, str]]:
    """The merge rules of a tokenizer.json, best first: written as "a b" or, since 2024, as ["a", "b"]."""
    merges = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in model["merges"]]
    vocab = model["vocab"]
    for rule in merges:
        if len(rule) != 2 or rule[0] not in vocab or rule[1] not in vocab or "".join(rule) not in vocab:
            raise ValueError(f"{where}: the merge rule {rule} names tokens that are not in the vocabulary")
    return merges


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`).

    Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up: a space is written "Ġ".
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]


BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}


def join_tokens(tokens: list[str], decoder: dict | None) -> str:
    """Text of a list of tokens by the `decoder` section of a tokenizer.json (None: joined with spaces)."""
    if decoder is None:
        return " ".join(tokens)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        tokens = _STEPS[step["type"]](tokens, step)
    return "".join(tokens)


def check_decoder(decoder: dict | None, where: str) -> None:
    """Raise ValueError for a decoder that `join_tokens` does not know."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": "Fuse"}]
    for step in steps:
        if step["type"] not in _STEPS or (step["type"] == "Replace" and "String" not in step["pattern"]):
            raise ValueError(f"{where}: decoder {step} is not supported (supported: {', '.join(_STEPS)})")


def _byte_level(tokens: list[str], _: dict) -> list[str]:
    raw = bytearray()
    for token in tokens:
        try:
            raw += bytes([BYTE_OF[char] for char in token])
        except KeyError:  # an added token outside the alphabet, such as "<｜end｜>"
            raw += token.encode()
    return [raw.decode(errors="replace")]


def _byte_fallback(tokens: list[str], _: dict) -> list[str]:
    """Runs of byte tokens such as <0xF0> become text; a run that is not UTF-8 one � per byte."""
    out: list[str] = []
    run = bytearray()
    for token in [*tokens, None]:
        byte = BYTE_TOKEN.fullmatch(token) if token is not None else None
        if byte:
            run.append(int(byte[1], 16))
            continue
        if run:
            try:
                out.append(run.decode())
            except UnicodeDecodeError:
                out.extend("�" * len(run))
            run.clear()
        if token is not None:
            out.append(token)
    return out


def _strip(tokens: list[str], step: dict) -> list[str]:
    def strip(token: str) -> str:
        char = step["content"]
        head = len(token) - len(token.lstrip(char))
        tail = len(token) - len(token.rstrip(char))
        return token[min(head, step["start"]) : len(token) - min(tail, step["stop"])]

    return [strip(token) for token in tokens]


def _metaspace(tokens: list[str], step: dict) -> list[str]:
    mark = step["replacement"]
    prefixed = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
    first = [token.replace(mark, "" if prefixed else " ") for token in tokens[:1]]
    return first + [token.replace(mark, " ") for token in tokens[1:]]


_STEPS = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Fuse": lambda tokens, _: ["".join(tokens)],
    "Metaspace": _metaspace,
    "Replace": lambda tokens, step: [t.replace(step["pattern"]["String"], step["content"]) for t in tokens],
    "Strip": _strip,
}
