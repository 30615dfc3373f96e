"""Tokenizers against `tokenizers`, `sentencepiece`, tiktoken and transformers: the same ids, spans and text."""

import io
import json
import os
import random
import shutil
import time
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from data.tokenizers.bpe import merge
from data.tokenizers.byte_level_bpe import LLAMA3_SPLIT
from data.tokenizers.load import LLAMA3_SPECIAL, Tokenizer, byte_level_bpe, load_tokenizer
from data.tokenizers.unicode_nfc import compose
from tests.data.tokenizers.random_text import SNIPPETS, random_strings

REAL = Path(os.environ.get("HANDTUNE_TEST_DATA", "missing"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="HANDTUNE_TEST_DATA is unset: no real tokenizers, no GSM8K")
LLAMA2, LLAMA3 = REAL / "tokenizers" / "llama2", REAL / "tokenizers" / "llama3"


def write(folder: Path, **files: dict | str) -> Path:
    """A folder of JSON files, named without their ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def assert_same(ours: Tokenizer, oracle: tokenizers.Tokenizer, strings, spans: bool = True) -> None:
    """Equal ids, spans and decoded text on every string, and equal text of random ids."""
    rng = random.Random(0)
    for text in strings:
        expected = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text) == expected.ids, text
        ids, places = ours.encode_with_spans(text)
        assert ids == expected.ids
        if spans:
            assert places == expected.offsets, text
        some = [rng.randrange(ours.vocab_size + 3) for _ in range(6)]
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), text
            assert ours.decode(some, skip) == oracle.decode(some, skip_special_tokens=skip), some


# Llama 3


@cache
def llama3_oracle() -> tokenizers.Tokenizer:
    converter = TikTokenConverter(str(LLAMA3 / "tokenizer.model"), extra_special_tokens=LLAMA3_SPECIAL)
    oracle = converter.converted()
    bos = oracle.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    oracle.post_processor = template
    return oracle


@pytest.mark.slow(3)
@needs_data
def test_llama3(tmp_path):
    oracle = llama3_oracle()
    from_json = load_tokenizer(write(tmp_path, tokenizer=oracle.to_str()))
    from_ranks = load_tokenizer(LLAMA3)
    assert from_json.model.encoding is not None  # 280,147 rules, and tiktoken proven equal to them
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_247|>"]
    assert_same(from_json, oracle, random_strings(3_000, special))
    for text in random_strings(3_000, special):
        assert from_ranks.encode(text) == from_json.encode(text), text

    assert from_ranks.special_tokens == from_ranks.control_tokens == from_json.special_tokens
    assert (from_ranks.bos_id, from_ranks.eos_id, from_ranks.pad_id) == (128_000, 128_001, None)
    assert from_ranks.vocab_size == from_json.vocab_size == 128_256
    assert from_ranks.special_tokens["<|eot_id|>"] == 128_009
    assert from_ranks.special_tokens["<|reserved_special_token_247|>"] == 128_255
    assert from_json.adds_bos and from_ranks.adds_bos and from_json.bos_id == 128_000
    assert from_json.encode_prompt("Hi") == oracle.encode("Hi").ids == [128_000, 13_347]
    assert from_json.encode_prompt("<|begin_of_text|>Hi") == [128_000, 13_347]


@needs_data
def test_rank_file_takes_its_special_tokens_from_the_config(tmp_path):
    added = {"128000": {"content": "<bos>", "special": True}, "128001": {"content": "<eos>", "special": True}}
    config = {"added_tokens_decoder": added, "bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    shutil.copy(LLAMA3 / "tokenizer.model", write(tmp_path, tokenizer_config=config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"<bos>": 128_000, "<eos>": 128_001}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (128_000, 128_001, True)


@pytest.mark.slow(1)
@needs_data
def test_gsm8k_takes_seconds(tmp_path):
    with open(REAL / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = load_tokenizer(LLAMA3)
    start = time.perf_counter()
    count = sum(len(tokenizer.encode(row["question"] + "\n" + row["answer"])) for row in rows)
    assert len(rows) == 7473 and count == 1_177_965
    assert time.perf_counter() - start < 10


@pytest.mark.slow(1)
@needs_data
@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_100_000,
        "x" + " \n" * 10 + " " * 1_100_000 + "y",
        "\n" * 1_100_000 + "y",
        "中" * 100_000,
    ],
    ids=["letters", "spaces", "spaces then text", "lines then text", "chinese"],
)
def test_a_megabyte_of_one_kind_of_character(text):
    assert load_llama3().encode(text) == llama3_oracle().encode(text, add_special_tokens=False).ids


@cache
def load_llama3() -> Tokenizer:
    return load_tokenizer(LLAMA3)


# Llama 2


@cache
def llama2_json() -> dict:
    """Llama 2's tokenizer.json, made from its tokenizer.model: rules in the order of their pieces' scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2 / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    rules = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                rules.append((-model.get_score(i), vocab[left], vocab[right], left, right))
    merges = [[left, right] for *_, left, right in sorted(rules)]
    special = [{"id": vocab[name], "content": name, "special": True} for name in ("<unk>", "<s>", "</s>")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": [token | flags for token in special],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
LLAMA2_TEXT = ["<s>", "</s>", "<unk>", "</s><s>[INST] <<SYS>>\n"]


@pytest.mark.slow(1)
@needs_data
@pytest.mark.parametrize(
    "sections",
    [
        {"normalizer": PREPEND},
        {"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}},
        {"pre_tokenizer": METASPACE | {"prepend_scheme": "always", "split": True}},
        {"pre_tokenizer": METASPACE | {"prepend_scheme": "never"}},
        {"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}, "decoder": METASPACE | {"prepend_scheme": "first"}},
        {"normalizer": PREPEND, "decoder": None},
    ],
    ids=["legacy", "first", "always", "never", "metaspace decoder", "no decoder"],
)
def test_llama2_json(tmp_path, sections):
    spec = llama2_json() | sections
    ours = load_tokenizer(write(tmp_path, tokenizer=spec))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert_same(ours, oracle, random_strings(700, LLAMA2_TEXT))


@pytest.mark.slow(1)
@needs_data
def test_llama2_model_is_what_sentencepiece_says(tmp_path):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2 / "tokenizer.model"))
    bare = load_tokenizer(LLAMA2)
    legacy = load_tokenizer(write(tmp_path, tokenizer=llama2_json() | {"normalizer": PREPEND}))
    for text in random_strings(3_000):
        ids = reference.encode(text) if not any(token in text for token in LLAMA2_TEXT[:3]) else bare.encode(text)
        assert bare.encode(text) == ids, text
    for text in random_strings(700, LLAMA2_TEXT):
        assert bare.encode_with_spans(text) == legacy.encode_with_spans(text), text
        ids = bare.encode(text)
        assert bare.decode(ids) == legacy.decode(ids)
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.vocab_size) == (1, 2, None, 32_000)
    assert bare.adds_bos and bare.encode_prompt("Hello") == [1, 15043]


@needs_data
@pytest.mark.parametrize("legacy", [True, False])
def test_llama2_model_prefix_follows_the_config(tmp_path, legacy):
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": False, "add_eos_token": True}
    shutil.copy(LLAMA2 / "tokenizer.model", write(tmp_path, tokenizer_config=config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello</s>Hello") == [15043, 2, 15043 if legacy else 10994]
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (False, True)


@pytest.mark.slow(1)
@needs_data
def test_llama2_in_transformers(tmp_path):
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = llama2_json() | {"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}
    spec["post_processor"] = json.loads(template.__getstate__())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    ours = load_tokenizer(write(tmp_path, tokenizer=spec, tokenizer_config=config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 32_000) == (1, 2, theirs.pad_token_id)
    for text in random_strings(500, [*LLAMA2_TEXT, "<pad>"]):
        assert ours.encode_prompt(text) == theirs(text).input_ids or text.startswith("<s>")
        assert ours.encode_with_spans(text)[1] == theirs(text, return_offsets_mapping=True).offset_mapping[1:]
        ids = ours.encode_prompt(text)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == expected


@pytest.mark.slow(3)
@needs_data
def test_a_megabyte_through_the_python_merge_loop(tmp_path):
    spec = llama2_json() | {"normalizer": PREPEND}
    ours = load_tokenizer(write(tmp_path, tokenizer=spec))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in ("a" * 300_000, " " * 300_000 + "x"):
        assert ours.encode(text) == oracle.encode(text).ids


def test_sentencepiece_with_a_lossy_normalizer(tmp_path):
    """NFKC rewrites the text and spaces are trimmed; the ids and the places in the original must be right."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog, ﬁne"] * 200 + SNIPPETS),
        model_writer=trained,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    assert reference.encode("  ﬁne   ﬁne") == reference.encode("fine fine")
    ours = load_tokenizer(tmp_path)
    for text in random_strings(1_000):
        ids, spans = ours.encode_with_spans(text)
        if "<s>" not in text and "</s>" not in text:
            assert ids == ours.encode(text) == reference.encode(text), text
        assert all(0 <= start <= stop <= len(text) for start, stop in spans)
        starts = [start for start, _ in spans]
        assert starts == sorted(starts)
    ids, spans = ours.encode_with_spans("  the   🙂 fox")
    assert [ours.token_of(i) for i in ids][0] == "▁the" and spans[0][1] == 5
    assert {spans[i] for i, token in enumerate(ids) if ours.token_of(token).startswith("<0x")} == {(8, 9)}


# Byte-level BPE, trained on the spot

QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
CASE_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str | Regex) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])


def digits(individual: bool) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), byte_level])


PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2 with a space in front": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "llama3": lambda: split_by(Regex(LLAMA3_SPLIT)),
    "qwen": lambda: split_by(Regex(QWEN_SPLIT)),
    "by case": lambda: split_by(Regex(CASE_SPLIT)),
    "smollm2": lambda: digits(individual=True),
    "runs of digits": lambda: digits(individual=False),
    "regex with gaps": lambda: split_by(Regex(r"\p{L}+")),
    "string": lambda: split_by(" "),
    "no regex": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
}


def trained(pre_tokenizer, size: int = 900, alphabet: bool = True, unk: str | None = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    corpus = [*random_strings(600, seed=1), *SNIPPETS * 10] if alphabet else [s for s in SNIPPETS * 10 if s.isascii()]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_trained_byte_level(tmp_path, name):
    oracle = trained(PRE_TOKENIZERS[name]())
    oracle.normalizer = normalizers.NFC() if name == "qwen" else None
    ours = load_tokenizer(write(tmp_path, tokenizer=oracle.to_str()))
    assert ours.model.encoding is not None
    # Spans under NFC are coarser than the reference's where several marks are composed at once.
    assert_same(ours, oracle, random_strings(1_000, ["<s>", "</s>"], seed=2), spans=name != "qwen")


@pytest.mark.slow(1)
@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_byte_level_without_the_whole_alphabet(tmp_path, unk):
    """Bytes that the vocabulary lacks vanish before their neighbours are joined, or become the unknown token."""
    oracle = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet=False, unk=unk)
    ours = load_tokenizer(write(tmp_path, tokenizer=oracle.to_str()))
    assert len(ours.model.known_bytes) < 100
    assert_same(ours, oracle, random_strings(1_000, ["<s>"], seed=3), spans=False)


def test_byte_level_with_the_old_spelling_of_merges(tmp_path):
    oracle = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    spec = json.loads(oracle.to_str())
    spec["model"]["merges"] = [" ".join(rule) for rule in spec["model"]["merges"]]
    assert_same(load_tokenizer(write(tmp_path, tokenizer=spec)), oracle, random_strings(200))


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("name", "end"),
    [("gpt2", "\n7"), ("llama3", "\nx"), ("llama3", "x"), ("smollm2", "7"), ("smollm2", "x"), ("no regex", "x")],
)
def test_a_million_spaces_before_text(tmp_path, name, end):
    oracle = trained(PRE_TOKENIZERS[name](), size=400)
    ours = load_tokenizer(write(tmp_path, tokenizer=oracle.to_str()))
    text = " " * 1_050_000 + end
    assert ours.encode(text) == oracle.encode(text).ids


# The proof that tiktoken may stand in for the list of merges


def random_vocabulary(rng: random.Random) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary over two or three letters, and rules for it: as trained, shuffled, incomplete, or every one."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens, merges = list("abc"[: rng.randrange(2, 4)]), []
    for _ in range(rng.randrange(1, 25)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            tokens.append(left + right)
            merges.append((left, right))
    kind = rng.randrange(4)
    if kind == 1:
        rng.shuffle(merges)
    if kind > 1:
        cuts = [[(token[:i], token[i:]) for i in range(1, len(token))] for token in tokens if len(token) > 1]
        pairs = [[pair for pair in cut if pair[0] in vocab and pair[1] in vocab] for cut in cuts]
        merges = [rng.choice(some) for some in pairs] if kind == 2 else [pair for some in pairs for pair in some]
    return vocab, merges


@pytest.mark.slow(2)
def test_tiktoken_stands_in_only_where_it_is_equal():
    fast = 0
    for seed in range(200):
        rng = random.Random(seed)
        vocab, merges = random_vocabulary(rng)
        oracle = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=seed % 2 == 0))
        oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        ours = byte_level_bpe.from_json(json.loads(oracle.to_str()), "tokenizer.json")
        fast += ours.encoding is not None
        for _ in range(20):
            text = "".join(rng.choice("aabbc ") for _ in range(rng.randrange(1, 25)))
            text = text if rng.random() < 0.7 else text[:3] * 8
            expected = oracle.encode(text).ids
            assert ours.encode(text, True, False)[0] == expected, (seed, merges, text)
            assert ours._encode_slowly(text)[0] == expected, (seed, merges, text)
    assert 100 < fast < 185  # both ways are tested


def test_merge_pair_by_pair():
    ranks = {("a", "b"): 0, ("ab", "c"): 1, ("b", "c"): 2}
    assert merge(list("abcbc"), ranks) == [("abc", 0, 3), ("bc", 3, 5)]
    assert merge([], ranks) == []
    assert merge(list("aaa"), {("a", "a"): 0}) == [("aa", 0, 2), ("a", 2, 3)]


# Special and added tokens


def test_added_tokens_in_text(tmp_path):
    oracle = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    oracle.normalizer = normalizers.NFC()
    oracle.add_tokens(
        [
            AddedToken("foo bar"),
            AddedToken("word", single_word=True, normalized=False),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<s><s>", normalized=False),
            AddedToken("é!", normalized=True),
            AddedToken("   ", normalized=False),
        ]
    )
    oracle.add_special_tokens([AddedToken("<both>", lstrip=True, rstrip=True)])
    ours = load_tokenizer(write(tmp_path, tokenizer=oracle.to_str()))
    pieces = ["foo bar", "word", " word ", "sword", "word_", " \n<left>", "<right>\t ", " <both> <both>"]
    pieces += ["<s><s>", "<s>", "é!", "e\u0301!", "   ", "<s", "<s><s><s>"]
    assert_same(ours, oracle, random_strings(3_000, pieces * 3, seed=5), spans=False)
    assert_same(ours, oracle, (text for text in random_strings(2_000, pieces) if text.isascii()))
    assert ours.control_tokens.keys() == {"<s>", "</s>", "<unk>", "<both>"}
    assert ours.special_tokens["foo bar"] == oracle.token_to_id("foo bar")


PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
BOS = PLAIN | {"content": "<s>", "__type": "AddedToken"}
CONFIGS = {
    "strings": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}},
    "dicts": {"tokenizer_config": {"bos_token": BOS, "eos_token": "</s>"}},
    "extra": {"tokenizer_config": {"eos_token": "</s>", "additional_special_tokens": ["<x>", "<y>"]}},
    "listed": {
        "tokenizer_config": {
            "eos_token": "<end>",
            "added_tokens_decoder": {
                "0": PLAIN | {"content": "<s>", "special": True},
                "900": PLAIN | {"content": "<end>", "special": True},
                "901": PLAIN | {"content": "tool", "special": False, "normalized": True},
            },
        }
    },
    "older files": {
        "tokenizer_config": {},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": PLAIN | {"content": "</s>"}, "pad_token": "<pad>"},
        "added_tokens": {"<pad>": 900},
    },
    "a role for a plain token": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "done"}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_named_in_the_files_beside(tmp_path, name):
    oracle = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if name == "a role for a plain token":
        oracle.add_tokens(["done"])
    files = json.loads(json.dumps(CONFIGS[name]))
    files["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    write(tmp_path, tokenizer=oracle.to_str(), config={"model_type": "llama"}, **files)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for role in ("bos", "eos", "pad"):
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    assert ours.special_tokens == {token.content: i for i, token in theirs.added_tokens_decoder.items()}
    special = {token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.control_tokens == special and ours.vocab_size == len(theirs)
    assert_same(ours, theirs.backend_tokenizer, random_strings(300, ["[PAD]", "<x>", "<end>", "tool", "<pad>", "done"]))


def test_ids_of_last_resort(tmp_path):
    write(tmp_path, tokenizer=trained(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (None, None)
    write(tmp_path, config={"bos_token_id": 0, "eos_token_id": 7}, generation_config={"eos_token_id": [1, 2]})
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (0, 1)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_bos_and_eos_are_added_as_transformers_adds_them(tmp_path, template):
    oracle = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    special = [("<s>", 0), ("</s>", 1)]
    byte_level = processors.ByteLevel(trim_offsets=False)
    oracle.post_processor = processors.Sequence(
        [byte_level, processors.TemplateProcessing(single=template, special_tokens=special)]
    )
    # transformers ignores these two beside a tokenizer.json
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    write(tmp_path, tokenizer=oracle.to_str(), tokenizer_config=config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("hello").input_ids
    assert ours.adds_bos == (ids[0] == 0) and ours.adds_eos == (ids[-1] == 1)
    assert ours.encode_prompt("hello") == (ids[:-1] if ours.adds_eos else ids)


def test_normalization_form_c_is_that_of_tokenizers():
    rng = random.Random(0)
    nfc = normalizers.NFC().normalize_str
    letters = [chr(i) for i in range(0x110000) if unicodedata.decomposition(chr(i)).count(" ") == 1]
    marks = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i))[0] == "M"]
    new = [chr(i) for start in (0x11380, 0x16100, 0x16D60, 0x11930, 0x1160, 0x1AB0) for i in range(start, start + 64)]
    for _ in range(20_000):
        text = "".join(rng.choice(rng.choice((letters, marks, new, "ab "))) for _ in range(rng.randrange(1, 7)))
        composed, spans = compose(text)
        assert composed == nfc(text), text.encode("unicode_escape")
        assert spans is None or (len(spans) == len(composed) and spans[-1][1] == len(text))
    assert compose("xe\u0301y") == ("xéy", [(0, 1), (1, 3), (3, 4)])


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "holds a tokenizer of type Unigram; only BPE"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer .*NFKC.* is not supported"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]}},
            "Pun",
        ),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "pre_tokenizer .*Bert.* is not supported"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "post_processor RobertaProcessing is not supported"),
        ({"decoder": {"type": "CTC"}}, "decoder .*CTC.* is not supported"),
    ],
)
def test_unsupported_tokenizer_json(tmp_path, changes, message):
    spec = json.loads(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str()) | changes
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(write(tmp_path, tokenizer=spec))
    assert "tokenizer.json" in str(error.value)


def test_what_cannot_mean_the_same_is_refused(tmp_path):
    """A regex with another meaning elsewhere, a rule for a token that is not there, half a character."""
    spec = json.loads(trained(split_by(Regex(r"\w+|$"))).to_str())
    with pytest.raises(ValueError, match="Split by a regex without"):
        load_tokenizer(write(tmp_path, tokenizer=spec))
    spec = json.loads(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())
    ours = load_tokenizer(write(tmp_path, tokenizer=spec))
    with pytest.raises(ValueError, match="character 2 of the text is a lone surrogate"):
        ours.encode("ab\ud800")
    spec["model"]["merges"].append(["zq", "a"])
    with pytest.raises(ValueError, match="names tokens that are not in the vocabulary"):
        load_tokenizer(write(tmp_path, tokenizer=spec))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for tokenizer.json and tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json is not valid JSON"):
        load_tokenizer(write(tmp_path / "cut", tokenizer='{"model": {"type": "BPE", "vocab": {'))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for name, content in {"empty": b"", "pointer": pointer}.items():
        (write(tmp_path / name) / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model is"):
            load_tokenizer(tmp_path / name)
    (write(tmp_path / "few") / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="lacks some of the 256 single bytes"):
        load_tokenizer(tmp_path / "few")


def test_tiktoken_is_new_enough():
    """Before 0.13 its regex overflows the stack on a million letters, and merging them takes minutes."""
    assert tuple(map(int, tiktoken.__version__.split(".")[:2])) >= (0, 13)
