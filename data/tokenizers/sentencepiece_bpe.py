"""SentencePiece-style BPE: Llama 2, TinyLlama, Vicuna. Words carry their space in front, written "▁".

Two sources, two classes: `MetaspaceBPE` is the tokenizer.json of such a model, and needs nothing else;
`SentencePieceModel` is a tokenizer.model alone, through the sentencepiece package (Kudo and Richardson,
arXiv:1808.06226). Characters that no token covers are written as bytes, <0xF0>.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from data.tokenizers.bpe import merge, read_merges

Span = tuple[int, int]

MARK = "▁"
DECODER = [{"type": "Replace", "pattern": {"String": MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
CACHED_WORDS = 200_000


class MetaspaceBPE:
    """BPE over characters with byte fallback.

    `prepend`: where a Metaspace pre-tokenizer puts a "▁" that is not there yet: "never", "first" (before the beginning
    of the whole text) or "always" (before every stretch between special tokens). None: there is no Metaspace.
    """

    def __init__(
        self, model: dict, merges: list[tuple[str, str]], *, normalizers: list[dict], prepend: str | None, split: bool
    ):
        self.vocab = model["vocab"]
        self.unk_token, self.fuse_unk = model.get("unk_token"), model.get("fuse_unk", False)
        self.byte_fallback = model.get("byte_fallback", False)
        self.ignore_merges = model.get("ignore_merges", False)
        self.normalizers, self.prepend = normalizers, prepend
        self.merge_ranks = {pair: rank for rank, pair in enumerate(merges)}
        # Where no rule joins anything to a "▁" behind it, words are independent, and most of them are old friends.
        independent = MARK in self.vocab and not any(re.search(f"[^{MARK}]{MARK}", "".join(pair)) for pair in merges)
        if split:
            self.words = re.compile(f"{MARK}[^{MARK}]*|[^{MARK}]+")
        else:
            self.words = re.compile(
                f"{MARK}*[^{MARK}]+|{MARK}+" if independent and not self.ignore_merges else r"[\s\S]+"
            )
        self.cache: dict[str, list[tuple[str, int, int]]] = {}

    def normalize(self, text: str) -> tuple[str, list[Span] | None]:
        """The text after the `normalizer` section, and for each character the span it stands for."""
        spans = None
        for step in self.normalizers:
            if step["type"] == "Replace":
                text = text.replace(step["pattern"]["String"], step["content"])  # one character for one
            elif text:
                spans = [(0, 1)] * len(step["prepend"]) + [(i, i + 1) for i in range(len(text))]
                text = step["prepend"] + text
        return text, spans

    def encode(self, text: str, at_start: bool, want_spans: bool) -> tuple[list[int], list[Span]]:
        """Ids of a normalized text without special tokens and, if wanted, the characters that each covers."""
        added = 0
        if self.prepend is not None:
            text = text.replace(" ", MARK)
            if (self.prepend == "always" or (self.prepend == "first" and at_start)) and not text.startswith(MARK):
                text, added = MARK + text, 1
        ids: list[int] = []
        spans: list[Span] = []
        for word in self.words.finditer(text):
            tokens = self.cache.get(word[0])
            if tokens is None:
                tokens = self._tokens(word[0])
                if len(self.cache) < CACHED_WORDS and len(word[0]) < 100:
                    self.cache[word[0]] = tokens
            ids += [self.vocab[token] for token, _, _ in tokens]
            if want_spans:
                start = word.start() - added  # the added mark counts as part of the first character
                spans += [(max(start + first, 0), max(start + last, 1)) for _, first, last in tokens]
        return ids, spans

    def _tokens(self, word: str) -> list[tuple[str, int, int]]:
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


def from_json(spec: dict, where: str) -> MetaspaceBPE:
    """The model, normalizer and pre_tokenizer sections of a tokenizer.json. Raises ValueError for what is not known."""
    normalizer, pre_tokenizer = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for step in steps:
        replaces = step["type"] == "Replace" and len(step["pattern"].get("String", "")) == len(step["content"]) == 1
        if not replaces and step["type"] != "Prepend":
            raise ValueError(
                f"{where}: normalizer {step} is not supported (supported: Prepend, Replace of one character)"
            )
    if [step["type"] for step in steps].count("Prepend") > 1:
        raise ValueError(f"{where}: more than one Prepend normalizer is not supported")

    prepend, split = None, False
    if pre_tokenizer is not None:
        if pre_tokenizer["type"] != "Metaspace" or pre_tokenizer["replacement"] != MARK:
            raise ValueError(
                f"{where}: pre_tokenizer {pre_tokenizer} is not supported (supported: none, Metaspace of ▁)"
            )
        always = "always" if pre_tokenizer.get("add_prefix_space", True) else "never"
        prepend, split = pre_tokenizer.get("prepend_scheme", always), pre_tokenizer.get("split", True)
    if sum(f"<0x{byte:02X}>" in spec["model"]["vocab"] for byte in range(256)) not in (0, 256):
        raise ValueError(f"{where}: the vocabulary has only some of the 256 byte tokens, <0x00> to <0xFF>")
    return MetaspaceBPE(
        spec["model"], read_merges(spec["model"], where), normalizers=steps, prepend=prepend, split=split
    )


class SentencePieceModel:
    """A tokenizer.model. `prepend` as above, for models that are trained with a "▁" in front of every text."""

    def __init__(self, path: Path, prepend: str):
        proto = path.read_bytes()
        try:
            self.with_mark = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # Messages of a protobuf merge: one more `normalizer_spec` that says add_dummy_prefix = false.
            self.without_mark = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        if not proto:
            raise ValueError(f"{path} is empty, expected a SentencePiece model or tiktoken's ranks; copy it again")
        self.prepend = prepend
        model = self.with_mark
        self.vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
        self.control_tokens = [piece for piece, i in self.vocab.items() if model.is_control(i) or model.is_unknown(i)]
        roles = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
        self.names = {f"{role}_token": model.id_to_piece(i) for role, i in roles.items() if i >= 0}
        never = prepend == "never" or model.encode("a") == self.without_mark.encode("a")
        self.decoder = {"type": "Sequence", "decoders": DECODER if never else [*DECODER, STRIP]}

    def normalize(self, text: str) -> tuple[str, list[Span] | None]:
        return text, None  # the model's own normalization is part of its encoding

    def encode(self, text: str, at_start: bool, want_spans: bool) -> tuple[list[int], list[Span]]:
        """Ids of a text without special tokens and, if wanted, the characters that each covers."""
        marked = self.prepend == "always" or (self.prepend == "first" and at_start)
        model = self.with_mark if marked else self.without_mark
        if not want_spans:
            return model.encode(text), []
        # Versions of the package differ in what else they offer; the serialized SentencePieceText they all have.
        pieces = [value for field, value in _fields(model.encode(text, out_type="serialized_proto")) if field == 2]
        char_at = [i for i, char in enumerate(text) for _ in range(len(char.encode()))] + [len(text)]
        ids: list[int] = []
        spans: list[Span] = []
        for piece in map(dict, map(_fields, pieces)):
            ids.append(piece[2])
            start, stop = char_at[piece[4]], char_at[piece[5]]
            # The added mark, and all bytes of a character but the last, come with an empty span.
            spans.append((start, min(max(stop, start + 1), len(text))))
        return ids, spans


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: variable-length integers, byte strings, 32-bit words."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        field, kind = divmod(integer(), 8)
        if kind == 0:
            yield field, integer()
        else:
            length = integer() if kind == 2 else 4
            at += length
            yield field, message[at - length : at]
