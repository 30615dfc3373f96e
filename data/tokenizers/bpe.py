"""What the tokenizers share: byte-pair encoding of a word, and turning tokens back into text.

Both follow the `tokenizers` library to the letter, because a model only knows the ids it was trained on.
"""

import heapq
import re

Span = tuple[int, int]

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


class BPE:
    """A vocabulary and its merge rules, best first; the options are those of tokenizer.json's `model` section."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        ignore_merges: bool = False,
        unk_token: str | None = None,
        fuse_unk: bool = False,
        byte_fallback: bool = False,
    ):
        self.vocab, self.ignore_merges = vocab, ignore_merges
        self.unk_token, self.fuse_unk, self.byte_fallback = unk_token, fuse_unk, byte_fallback
        self.merge_ranks = {pair: rank for rank, pair in enumerate(merges)}

    def tokens_of(self, word: str) -> list[tuple[str, int, int]]:
        """(token, first, last + 1) of a word, with indices of its characters."""
        if self.ignore_merges and word in self.vocab:
            return [(word, 0, len(word))]
        symbols: list[str] = []
        places: list[Span] = []
        for i, char in enumerate(word):
            as_bytes = [f"<0x{byte:02X}>" for byte in char.encode()]
            if char in self.vocab:
                new = [char]
            elif self.byte_fallback and as_bytes[0] in self.vocab:
                new = as_bytes
            elif self.unk_token is None:
                new = []  # such a character vanishes, as it does in `tokenizers`
            elif self.fuse_unk and symbols and symbols[-1] == self.unk_token:
                new = []
                places[-1] = (places[-1][0], i + 1)
            else:
                new = [self.unk_token]
            symbols += new
            places += [(i, i + 1)] * len(new)
        tokens = merge(symbols, self.merge_ranks)
        return [(token, places[first][0], places[last - 1][1]) for token, first, last in tokens]


def char_of_each_byte(text: str) -> list[int]:
    """For each byte of a text's UTF-8 form, the index of its character."""
    return [i for i, char in enumerate(text) for _ in range(len(char.encode()))]


def read_model(model: dict, where: str) -> dict:
    """What `BPE` takes, from the model section of a tokenizer.json.

    Merge rules are written as "a b" or, since 2024, as ["a", "b"].
    """
    merges = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in model["merges"]]
    vocab = model["vocab"]
    for rule in merges:
        if len(rule) != 2 or rule[0] not in vocab or rule[1] not in vocab or "".join(rule) not in vocab:
            raise ValueError(f"{where}: the merge rule {rule} names tokens that are not in the vocabulary")
    options = {key: model.get(key) for key in ("ignore_merges", "unk_token", "fuse_unk", "byte_fallback")}
    return {"vocab": vocab, "merges": merges} | options


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`).

    Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up: a space is written "Ġ".
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]


_ALPHABET = _byte_alphabet()
BYTE_OF = {char: byte for byte, char in enumerate(_ALPHABET)}


def in_alphabet(data: bytes) -> str:
    """Bytes in the characters that stand for them: b" world" is "Ġworld"."""
    return "".join([_ALPHABET[byte] for byte in data])


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
