"""Byte-level BPE: GPT-2, Llama 3, Qwen, SmolLM2. The text's UTF-8 bytes are merged within the words of a regex.

The work is tiktoken's, in Rust. A tokenizer.json and tiktoken do not mean quite the same, though: tiktoken joins any
two neighbours that make a token, `tokenizers` only the pairs on its list. `tiktoken_ranks` proves at load time that
this never matters for the vocabulary at hand; where it does matter, and for text whose bytes the vocabulary lacks,
`merge` does the same in Python, exactly but slowly.

tiktoken also splits the words: its tables of letters, digits and spaces are those of `tokenizers` (Unicode 16), while
Python's `re`, `regex` and `unicodedata` each have their own.
"""

import base64
import json
import math
import re
import unicodedata
from itertools import groupby
from pathlib import Path

import tiktoken

from data.tokenizers.bpe import BPE, BYTE_OF, Span, char_of_each_byte, in_alphabet, read_model
from data.tokenizers.unicode_nfc import compose

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT2_SPLIT on the stretches between numerals. `Digits` asks Rust's own table, whose Unicode 17 has a few more.
NUMERAL = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
DIGITS_SPLIT = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}{NUMERAL}]+|\s+(?![^\s{NUMERAL}])|\s+|[{NUMERAL}]"
# Spelt differently, or with another meaning, in the regex engine behind `tokenizers`.
FOREIGN_SYNTAX = re.compile(r"(?<!\\)\$|(?<![\[\\])\^|\\[wWbBhHRXZG]|\[\[:")

WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(f"[{WHITE_SPACE}]{{100000,}}")


class ByteLevelBPE(BPE):
    """One vocabulary. `vocab` maps tokens, in the byte alphabet ("Ġworld"), to ids.

    Exactly one of `merges` (rules, best first) and `ranks` (tiktoken's: bytes to rank) says what is joined.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        split: str,
        *,
        merges: list[tuple[str, str]] | None = None,
        ranks: dict[bytes, int] | None = None,
        add_prefix_space: bool = False,
        nfc: bool = False,
        **options,
    ):
        super().__init__(vocab, merges or [], **options)
        self.add_prefix_space, self.nfc = add_prefix_space, nfc
        self.is_rank_file = ranks is not None
        if ranks is None:
            ranks = tiktoken_ranks(vocab, merges, self.ignore_merges)

        # The possessive copy finds the same and does not overflow the stack on a million spaces at the end.
        split = re.sub(r"(?<=\|)\\s\+\((\?![^()]*)\)(?=\|)", r"\\s++(\1)|\\s+(\1)", split)
        self.encoding = self._encoding(split, ranks) if ranks else None
        self.known_bytes = {BYTE_OF[char] for char in vocab if char in BYTE_OF} if ranks else set()
        self.token_of_rank = {rank: token for token, rank in (ranks or {}).items()}
        self.id_of_rank = {r: vocab[in_alphabet(t)] for r, t in self.token_of_rank.items()}
        self.splits_spaces = r"\s++(?!" in split
        self.splits_digits, self.splits_newlines = NUMERAL in split, r"[\r\n]" in split
        # For the slow path: gives the bytes of the first word of a text and nothing of the others.
        self.first_word = self._encoding(rf"\A(?:{split})", {bytes([byte]): byte for byte in range(256)})

    @staticmethod
    def _encoding(split: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
        return tiktoken.Encoding("", pat_str=split, mergeable_ranks=ranks, special_tokens={})

    def normalize(self, text: str) -> tuple[str, list[Span] | None]:
        return compose(text) if self.nfc else (text, None)

    def encode(self, text: str, at_start: bool, want_spans: bool) -> tuple[list[int], list[Span]]:
        """Ids of a text without special tokens and, if wanted, the characters that each covers."""
        if not text:
            return [], []
        prefixed = self.add_prefix_space and not text.startswith(" ")
        if prefixed:
            text = " " + text
        data = text.encode()
        if self.encoding is None or not self.known_bytes.issuperset(data):
            ids, pieces = self._encode_slowly(text)
        else:
            found = [rank for part in self._parts(text) for rank in self.encoding.encode_ordinary(part)]
            ids, pieces = [self.id_of_rank[rank] for rank in found], []
            if want_spans:
                stop = 0
                for rank in found:
                    start, stop = stop, stop + len(self.token_of_rank[rank])
                    pieces.append((start, stop))
        if not want_spans:
            return ids, []
        char_at = range(len(data)) if len(data) == len(text) else char_of_each_byte(text)
        shift = 1 if prefixed else 0  # the added space counts as part of the first character
        spans = [(char_at[start] - shift, char_at[stop - 1] + 1 - shift) for start, stop in pieces]
        return ids, [(max(start, 0), max(stop, 1)) for start, stop in spans]

    def _parts(self, text: str) -> list[str]:
        """`text` cut after huge runs of spaces, less the last one, where words end anyway: tiktoken's regex
        needs a stack entry per space there, and there are a million of those."""
        parts, start = [], 0
        for run in LONG_SPACE.finditer(text) if self.splits_spaces and len(text) > 100_000 else ():
            last, following = text[run.end() - 1], text[run.end() : run.end() + 1]
            is_one_word = (
                not following
                or (self.splits_newlines and last in "\r\n")
                or (self.splits_digits and unicodedata.category(following)[0] == "N")
            )
            if not is_one_word:
                parts.append(text[start : run.end() - 1])
                start = run.end() - 1
        return [*parts, text[start:]]

    def _encode_slowly(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and the bytes they cover, exactly as in `tokenizers`: bytes without a token vanish *before*
        their neighbours are joined, or become the unknown token."""
        ids: list[int] = []
        spans: list[Span] = []
        offset = 0
        for word in self._words(text):
            for token, first, last in self.tokens_of(in_alphabet(word)):
                ids.append(self.vocab[token])
                spans.append((offset + first, offset + last))
            offset += len(word)
        return ids, spans

    def _words(self, text: str) -> list[bytes]:
        """The words of `text`. Only the first one can be asked for, so look at a window that holds it twice."""
        words, start = [], 0
        while start < len(text):
            width = 256
            while True:
                window = text[start : start + width]
                word = bytes(self.first_word.encode_ordinary(window))
                length = len(word.decode())
                if 2 * length < width or start + width >= len(text):
                    break
                width *= 2
            words.append(word)
            start += length
        return words


def tiktoken_ranks(
    vocab: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool
) -> dict[bytes, int] | None:
    """Ranks with which tiktoken gives the ids of these merge rules for any text; None if there are none.

    Token by token, best first: which two tokens do the better rules leave of its bytes? What becomes of a stretch of
    bytes does not depend on its surroundings as long as nothing is joined across its ends, so at most one pair can
    ever meet. Is it on the list, both join it. A token that no pair makes is never met by merging: it is dropped, or
    with `ignore_merges`, under which `tokenizers` looks up whole words, kept for tiktoken to look up.
    """
    ranks = {char: byte for char, byte in BYTE_OF.items() if char in vocab}
    halves = {char: (char, char) for char in ranks}  # the pair that makes each token
    unmade: dict[str, list[tuple[str, str]]] = {}

    def meet(left: str, right: str, rank: float) -> bool:
        """Whether nothing is joined across the border of `left` and `right` before the rule of this rank applies."""
        while True:
            if ranks.get(left + right, rank) < rank:
                return False
            # Undo what was made last; of two equal tokens that is the right one, because the leftmost pair goes first.
            if len(right) == 1 or (len(left) > 1 and ranks[left] > ranks[right]):
                if len(left) == 1:
                    return True
                rank, left = ranks[left], halves[left][1]
            else:
                rank, right = ranks[right] + 1, halves[right][0]

    for token, rules in groupby(enumerate(merges, start=256), key=lambda rule: "".join(rule[1])):
        (rank, first), *others = rules
        pairs = [first, *(pair for _, pair in others)]
        if token in ranks or token in unmade:
            return None
        made_by = [pair for pair in pairs if pair[0] in halves and pair[1] in halves and meet(*pair, rank)]
        if made_by:
            ranks[token], halves[token] = rank, made_by[0]
        else:
            unmade[token] = pairs
            if ignore_merges:
                ranks[token] = rank

    if ignore_merges:
        words = [token for token in vocab if token not in ranks and BYTE_OF.keys() >= set(token)]
        ranks |= {token: rank for rank, token in enumerate(words, start=256 + len(merges))}
        unmade = {t: [(t[:i], t[i:]) for i in range(1, len(t))] for t in [*unmade, *words]}
    late = any(  # made once its own turn is over, of parts that were made later?
        left in halves and right in halves and meet(left, right, ranks.get(token, math.inf))
        for token, pairs in unmade.items()
        for left, right in pairs
    )
    if late:  # what such a token meets is not known, which does not matter if every possible pair is on the list
        possible = sum(t[:i] in vocab and t[i:] in vocab for t in vocab for i in range(1, len(t)))
        if not ignore_merges or possible != len(set(merges)):
            return None
    return {bytes([BYTE_OF[char] for char in token]): rank for token, rank in ranks.items()}


def from_rank_file(path: Path) -> ByteLevelBPE:
    """Llama 3's original tokenizer.model: lines of a base64 token, a space and its rank, which is its id."""
    lines = path.read_bytes().splitlines()
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except ValueError as error:
        raise ValueError(f"{path} is neither a SentencePiece model nor a tiktoken rank file: {error}") from None
    if not ranks.keys() >= {bytes([byte]) for byte in range(256)}:
        raise ValueError(f"{path} lacks some of the 256 single bytes; is it truncated?")
    vocab = {in_alphabet(token): rank for token, rank in ranks.items()}
    return ByteLevelBPE(vocab, LLAMA3_SPLIT, ranks=ranks)


def from_json(spec: dict, where: str) -> ByteLevelBPE:
    """The model, normalizer and pre_tokenizer sections of a tokenizer.json. Raises ValueError for what is not known."""
    normalizer = spec.get("normalizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if [step["type"] for step in steps] not in ([], ["NFC"]):
        raise ValueError(f"{where}: normalizer {normalizer} is not supported in byte-level BPE (supported: none, NFC)")
    split, add_prefix_space = _split_pattern(spec["pre_tokenizer"], where)
    read = read_model(spec["model"], where) | {"byte_fallback": False}  # every byte is a character here
    return ByteLevelBPE(split=split, add_prefix_space=add_prefix_space, nfc=bool(steps), **read)


def _split_pattern(pre_tokenizer: dict, where: str) -> tuple[str, bool]:
    """(regex of the words, whether a space goes before a text) of a pre_tokenizer section."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds, last = [step["type"] for step in steps], steps[-1]
    use_regex, prefix = last.get("use_regex", True), last.get("add_prefix_space", False)
    if kinds == ["ByteLevel"]:
        return (GPT2_SPLIT if use_regex else r"[\s\S]+"), prefix
    if kinds == ["Digits", "ByteLevel"] and use_regex and not prefix:
        return DIGITS_SPLIT + ("" if steps[0]["individual_digits"] else "+"), False
    if kinds == ["Split", "ByteLevel"] and not use_regex and not prefix:
        pattern = steps[0]["pattern"].get("Regex") or re.escape(steps[0]["pattern"]["String"])
        if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] and not FOREIGN_SYNTAX.search(pattern):
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+", False  # what lies between the matches is a word, too
    raise ValueError(
        f"{where}: pre_tokenizer {json.dumps(pre_tokenizer)} is not supported (supported: ByteLevel; Digits and "
        "ByteLevel; Split by a regex without ^, $, \\w or \\b, and ByteLevel(use_regex=false))"
    )
