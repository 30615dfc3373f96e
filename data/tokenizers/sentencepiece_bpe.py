"""SentencePiece-style BPE: Llama 2, TinyLlama, Vicuna. Words carry their space in front, written "▁".

Two sources, two classes: `MetaspaceBPE` is the tokenizer.json of such a model, and needs nothing else;
`SentencePieceModel` is a tokenizer.model alone, through the sentencepiece package (Kudo and Richardson,
arXiv:1808.06226). Characters that no token covers are written as bytes, <0xF0>.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from data.tokenizers.bpe import BPE, Span, char_of_each_byte, read_model

MARK = "▁"
DECODER = [{"type": "Replace", "pattern": {"String": MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
CACHED_WORDS = 200_000


class MetaspaceBPE(BPE):
    """BPE over characters with byte fallback.

    `prepend`: where a Metaspace pre-tokenizer puts a "▁" that is not there yet: "never", "first" (before the beginning
    of the whole text) or "always" (before every stretch between special tokens). None: there is no Metaspace.
    """

    def __init__(self, *, normalizers: list[dict], prepend: str | None, split: bool, **model):
        super().__init__(**model)
        self.normalizers, self.prepend = normalizers, prepend
        # Where no rule joins anything to a "▁" behind it, words are independent, and most of them come again.
        inside = re.compile(f"[^{MARK}]{MARK}")
        independent = MARK in self.vocab and not any(inside.search(a + b) for a, b in self.merge_ranks)
        if split:
            pattern = f"{MARK}[^{MARK}]*|[^{MARK}]+"
        elif independent and not self.ignore_merges:
            pattern = f"{MARK}*[^{MARK}]+|{MARK}+"
        else:
            pattern = r"[\s\S]+"
        self.words = re.compile(pattern)
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
                tokens = self.tokens_of(word[0])
                if len(self.cache) < CACHED_WORDS and len(word[0]) < 100:
                    self.cache[word[0]] = tokens
            ids += [self.vocab[token] for token, _, _ in tokens]
            if want_spans:
                start = word.start() - added  # the added mark counts as part of the first character
                spans += [(max(start + first, 0), max(start + last, 1)) for _, first, last in tokens]
        return ids, spans


def from_json(spec: dict, where: str) -> MetaspaceBPE:
    """The model, normalizer and pre_tokenizer sections of a tokenizer.json. Raises ValueError for what is not known."""
    normalizer, pre_tokenizer = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for step in steps:
        replaces = step["type"] == "Replace" and len(step["pattern"].get("String", "")) == len(step["content"]) == 1
        if not replaces and step["type"] != "Prepend":
            raise ValueError(f"{where}: normalizer {step} is not supported (supported: Prepend, one-character Replace)")
    if [step["type"] for step in steps].count("Prepend") > 1:
        raise ValueError(f"{where}: more than one Prepend normalizer is not supported")

    prepend, split = None, False
    if pre_tokenizer is not None:
        if pre_tokenizer["type"] != "Metaspace" or pre_tokenizer["replacement"] != MARK:
            raise ValueError(f"{where}: pre_tokenizer {pre_tokenizer} is not supported (supported: none, Metaspace ▁)")
        always = "always" if pre_tokenizer.get("add_prefix_space", True) else "never"
        prepend, split = pre_tokenizer.get("prepend_scheme", always), pre_tokenizer.get("split", True)
    if sum(f"<0x{byte:02X}>" in spec["model"]["vocab"] for byte in range(256)) not in (0, 256):
        raise ValueError(f"{where}: the vocabulary has only some of the 256 byte tokens, <0x00> to <0xFF>")
    return MetaspaceBPE(normalizers=steps, prepend=prepend, split=split, **read_model(spec["model"], where))


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
        char_at = [*char_of_each_byte(text), len(text)]
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
