"""Strings on which tokenizers go wrong: every plane of Unicode, white space, code, digits, almost special tokens."""

import random
from collections.abc import Iterator

SNIPPETS = [
    *"the of and in Hello world token don't naïve über l'été GPT-4 XYZ foo".split(),
    *"def f(x):\n    return x**2 + 1\n|\t\tif (a != b) { c[i]++; } // ok\r\n|    \n\n   x|a=b==c|'''doc'''".split("|"),
    *"It's we'll THEY'RE I'D ſ's 'ſ|1234567 3.14159|½²Ⅷ٣४|https://x.y/z?q=1&r=%20|中文字符|日本語テキスト".split("|"),
    *"한국어|العربية|हिन्दी में|🙂👩‍👩‍👧‍👦🏳️‍🌈|é e\u0301 q\u0323\u0301|\u0301|\u200d\u200b\ufeff".split("|"),
    *"ﬁﬀ Å Ω|<0x0A>|▁ ▁▁a▁".split("|"),
    *"<|begin_of_text|;|>;</s;<s >;<S>;< s>;<|eot_id>;[INST]".split(";"),
]
SPACES = [*" \t\n\r\x0b\x0c\x1c\x85\0", "  ", "   ", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\u1680", " \n "]
RANGES = [(0x20, 0x7F), (0x80, 0x800), (0x300, 0x370), (0x800, 0x3000), (0x1100, 0x1200), (0xAC00, 0xD7A4)]
RANGES += [(0x10000, 0x12000), (0x1F000, 0x1FB00), (0, 0xD800), (0xE000, 0x110000), (0xE000, 0x110000)]


def random_strings(count: int, special: list[str] = (), seed: int = 0) -> Iterator[str]:
    """`count` strings of 0 to 25 pieces each, the empty one first; about one piece in ten is from `special`."""
    rng = random.Random(seed)
    yield ""
    for _ in range(count - 1):
        yield "".join(_piece(rng, special) for _ in range(rng.randrange(25)))


def _piece(rng: random.Random, special: list[str]) -> str:
    kind = rng.random()
    if kind < 0.1 and special:
        return rng.choice(special)
    if kind < 0.4:
        return rng.choice(SNIPPETS)
    if kind < 0.6:
        return rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 3, 8])
    if kind < 0.65:
        return str(rng.randrange(10 ** rng.randrange(1, 9)))
    if kind < 0.7:
        return rng.choice(" .,;:!?-_'\"()[]{}<>/\\|@#$%^&*~`+=") * rng.randrange(1, 6)
    if kind < 0.73:
        return "".join(rng.choice("ab.: \n1é") for _ in range(3)) * rng.randrange(1, 20)
    return chr(rng.randrange(*rng.choice(RANGES)))
