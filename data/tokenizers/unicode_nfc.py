"""Unicode normalization form C as the `tokenizers` library performs it (Qwen's normalizer), with character spans.

Its tables are those of Unicode 10, Python's are newer: what has been added since must be left alone.
"""

import re
import unicodedata

from data.tokenizers.bpe import Span

# Marks, and letters that compose, from Unicode 11 to 18.
NOT_COMPOSED = re.compile(
    "[\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa"
    "\ua82c\U000105d2\U000105da\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab\U00010eac\U00010ecb-\U00010ecf"
    "\U00010ef0-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U00011380-\U000113d0"
    "\U0001145e\U00011839\U0001183a\U00011930-\U0001193e\U00011943\U000119e0\U00011a34\U00011a47\U00011a99"
    "\U00011d42-\U00011d45\U00011d97\U00011f41\U00011f42\U00016100-\U0001612f\U00016d63-\U00016d6a\U00016ff0"
    "\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae"
    "\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee\U0001e6ef"
    "\U0001e6f5]"
)


def compose(text: str) -> tuple[str, list[Span] | None]:
    """`text` in Unicode's composed form (NFC) and, if that changed it, the span that each new character stands for."""
    if unicodedata.is_normalized("NFC", text) and not NOT_COMPOSED.search(text):
        return text, None
    out: list[str] = []
    spans: list[Span] = []
    start = 0
    while start < len(text):
        stop = start + 1
        if not NOT_COMPOSED.match(text[start]):
            while stop < len(text) and _joins_previous(text[stop]):
                stop += 1
        new = unicodedata.normalize("NFC", text[start:stop])
        changed = new != text[start:stop]
        spans += [(start, stop)] * len(new) if changed else [(i, i + 1) for i in range(start, stop)]
        out.append(new)
        start = stop
    return "".join(out), spans


def _joins_previous(char: str) -> bool:
    """Whether composing may join `char` to what stands before it: marks, vowel signs, the jamo of a syllable."""
    mark = unicodedata.combining(char) or unicodedata.category(char)[0] == "M" or "\u1160" <= char <= "\u11ff"
    return bool(mark) and not NOT_COMPOSED.match(char)
