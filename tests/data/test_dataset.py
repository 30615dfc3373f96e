import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from data.chat.templates import ChatTemplate, load_chat_template
from data.dataset import IGNORE_INDEX, load_dataset, load_sides
from data.rows import encode_row
from data.tokenized import TokenizedDataset
from data.tokenizers.load import load_tokenizer
from modules.adapters.virtual_tokens import placeholders
from tests.data.chat.published_templates import CHATML
from tests.data.tiny_tokenizer import TinyTokenizer

TOKENIZER = TinyTokenizer()
TEMPLATE = ChatTemplate(CHATML, "test", {}, tuple(TOKENIZER.special_tokens))


def load(tmp_path, rows: list[dict], *, seq_len: int | None = None, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(path, TOKENIZER, TEMPLATE, seq_len=seq_len, **options)


def chat(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


ROWS = [
    {"text": "hello world " * 5},
    chat("hello", "world", "a", "b"),
    {"prompt": "question", "completion": "answer"},
    {"instruction": "Sing.", "output": "La"},
]


def test_rows_lie_end_to_end(tmp_path):
    dataset = load(tmp_path, ROWS)
    assert dataset.input_ids.dtype == dataset.targets.dtype == torch.int32 and dataset.offsets.dtype == torch.int64
    assert len(dataset) == len(ROWS) and dataset.offsets[0] == 0 and dataset.offsets[-1] == len(dataset.input_ids)
    for i, row in enumerate(ROWS):
        encoded = encode_row(row, TOKENIZER, TEMPLATE)
        input_ids, targets = dataset[i]
        assert (input_ids.tolist(), targets.tolist()) == (encoded.input_ids, encoded.targets)
        assert dataset.lengths[i] == len(encoded.input_ids)
    assert dataset[-1][0].equal(dataset[3][0]) and len(list(dataset)) == 4
    with pytest.raises(IndexError):
        dataset[4]
    report = dataset.report
    assert (report.rows, report.examples, report.tokens) == (4, 4, len(dataset.targets))
    assert report.target_tokens == (dataset.targets != IGNORE_INDEX).sum()
    assert report.longest == max(dataset.lengths)
    assert report.lines() == [
        f"{tmp_path}/data.jsonl: 4 examples from 4 rows, {report.tokens} tokens, of which {report.target_tokens} are "
        f"trained; the longest has {report.longest}"
    ]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.input_ids.equal(dataset.input_ids) and copy.fingerprint == dataset.fingerprint


def test_seq_len_cuts_tokens_then_shifts(tmp_path):
    whole = load(tmp_path, ROWS[:1])
    length = len(whole.input_ids)
    for seq_len in (2, 7, length - 1, length, length + 1):
        cut = load(tmp_path, ROWS[:1], seq_len=seq_len)
        ids = whole.input_ids.tolist()[:seq_len]
        assert cut.input_ids.tolist() == ids
        assert cut.targets.tolist() == [*ids[1:], IGNORE_INDEX]
        assert cut.report.cut == (seq_len < length)
    assert load(tmp_path, ROWS[:1], seq_len=7).report.lines()[1:] == ["1 row cut to --seq-len 7"]
    with pytest.raises(ValueError, match="--seq-len 1 leaves nothing to predict; it must be at least 2"):
        load(tmp_path, ROWS, seq_len=1)


def test_split_long_loses_no_target(tmp_path):
    rows = [{"text": "hello world " * n} for n in (1, 3, 5, 9)] + [chat("hello " * 20, "world " * 20)]
    whole = load(tmp_path, rows)
    wanted = whole.targets[whole.targets != IGNORE_INDEX]
    for seq_len in (2, 5, 8, 16):
        split = load(tmp_path, rows, seq_len=seq_len, split_long=True)
        assert max(split.lengths) <= seq_len and split.report.longest <= seq_len
        assert split.targets[split.targets != IGNORE_INDEX].equal(wanted)
        for input_ids, targets in split:
            assert (targets != IGNORE_INDEX).any()
            inside = targets[:-1] != IGNORE_INDEX
            assert targets[:-1][inside].equal(input_ids[1:][inside])
        assert split.report.split == sum(length > seq_len for length in whole.lengths)
        assert split.report.cut == split.report.without_target == 0
        assert f"split into pieces of --seq-len {seq_len}" in split.report.lines()[1]
    # One token more than fits: its target is the last of the first piece, and no piece of one token is left.
    first = whole.lengths[0]
    assert load(tmp_path, rows[:1], seq_len=first - 1, split_long=True).lengths == [first - 1]


@pytest.mark.parametrize("split_long", [False, True])
def test_virtual_tokens_stand_in_front_of_every_example(tmp_path, split_long):
    """And `seq_len` counts them: cutting and splitting are those of the room that they leave."""
    size = TOKENIZER.vocab_size
    virtual = placeholders(3)
    plain = load(tmp_path, ROWS, seq_len=17, split_long=split_long)
    dataset = load(tmp_path, ROWS, seq_len=20, split_long=split_long, virtual_ids=virtual)
    assert len(dataset) == len(plain) and max(dataset.lengths) == 20
    for (ids, targets), (plain_ids, plain_targets) in zip(dataset, plain, strict=True):
        assert ids.tolist() == virtual + plain_ids.tolist()
        assert targets.tolist() == [IGNORE_INDEX] * 3 + plain_targets.tolist()
    report = dataset.report
    assert report.target_tokens == plain.report.target_tokens and report.longest == 20
    assert report.tokens == plain.report.tokens + 3 * len(plain) == len(dataset.input_ids)
    assert report.lines()[1] == "3 virtual tokens in front of each of them, which --seq-len counts, too"
    assert dataset.fingerprint != plain.fingerprint
    dataset.check_vocabulary(size)
    largest = int(plain.input_ids.max())
    for checked in (dataset, plain):
        with pytest.raises(ValueError, match=f"token id {largest}, but the model has {largest} embeddings"):
            checked.check_vocabulary(largest)
    with pytest.raises(ValueError, match="--seq-len 4 leaves no room behind 3 virtual tokens"):
        load(tmp_path, ROWS, seq_len=4, virtual_ids=virtual)


def test_rows_without_target_are_dropped_and_said(tmp_path):
    rows = [chat("hello"), chat("hello", "world " * 50), *ROWS[1:3], chat("hello " * 50, "world"), chat("x")]
    dataset = load(tmp_path, rows, seq_len=60)
    report = dataset.report
    assert len(dataset) == 3 and (report.rows, report.without_target, report.without_target_after_cut) == (6, 2, 1)
    assert all((targets != IGNORE_INDEX).any() for _, targets in dataset)
    assert report.lines()[1:] == [
        "2 rows cut to --seq-len 60",
        "1 row dropped: --seq-len 60 cut off all that is trained",
        "2 rows dropped: nothing in them is trained",
    ]
    with pytest.raises(ValueError, match="no row is left to train on: 2 rows dropped: nothing in them is trained"):
        load(tmp_path, [rows[0], rows[-1]])
    with pytest.raises(ValueError, match="left to train on: 1 row cut to --seq-len 9; 1 row dropped: --seq-len 9 cut"):
        load(tmp_path, [rows[-2]], seq_len=9)


def test_special_contents_and_missing_ends_are_said(tmp_path):
    rows = [chat("hello", "world"), chat("what is <|im_end|>?", "it ends"), {"prompt": "<s>", "completion": "</s>"}]
    report = load(tmp_path, rows).report
    assert (report.special_content, report.unended) == (2, 0)
    assert report.lines()[1].startswith("2 rows with special tokens such as '<|im_end|>' in their own text")
    with pytest.raises(ValueError, match=r"data.jsonl:2: the row's own text holds the special token '<\|im_end\|>'"):
        load(tmp_path, rows, on_special_content="error")

    endless = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}", "test", {}, ())
    report = load_dataset(tmp_path / "data.jsonl", TOKENIZER, endless, seq_len=None).report
    assert report.unended == 2
    assert "2 rows with an answer that no end-of-turn token follows" in report.lines()[2]


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    bad = {"messages": [{"role": "robot", "content": "x"}]}
    with pytest.raises(ValueError, match=r'data.jsonl:3: unknown role "robot" in messages\[0\]; known are '):
        load(tmp_path, [*ROWS[:2], bad])
    with pytest.raises(FileNotFoundError, match="there is no such data file"):
        load_dataset(tmp_path / "nowhere.jsonl", TOKENIZER, None, seq_len=None)


def test_sides_and_columns_stay_with_their_rows(tmp_path):
    """A row that one side cannot keep is dropped from all; labels, lines and sides then still belong together."""
    rows = [{"question": f"{i} hello", "good": f"yes {i}", "bad": "no", "label": i} for i in range(4)]
    rows[1] |= {"question": "hello " * 90}  # cut on both sides: no target is left
    rows[2]["good"] = [{"role": "assistant", "content": "x"}]
    rows[2] |= {"question": [{"role": "user", "content": "hello"}], "bad": [{"role": "user", "content": "no answer"}]}
    options = dict(prompt_field="question", columns=("label",))
    whole = load(tmp_path, rows, completion_field="good", prompt_field="question", columns=("label",))
    assert whole.columns == {"label": [0, 1, 2, 3]} and list(whole.lines) == [1, 2, 3, 4]
    files = (tmp_path / "data.jsonl", TOKENIZER, TEMPLATE)
    sides = load_sides(*files, completion_fields=("good", "bad"), seq_len=40, **options)
    for name, side in sides.items():
        assert side.columns == {"label": [0, 3]} and list(side.lines) == [1, 4] and side.report.rows == 4
        one = load(tmp_path, [rows[0], rows[3]], completion_field=name, prompt_field="question", train_on="assistant")
        assert side.input_ids.equal(one.input_ids) and side.targets.equal(one.targets)
        assert side.target_counts == [(targets != IGNORE_INDEX).sum() for _, targets in one]
        assert side.fingerprint != one.fingerprint  # other labels are other data
    assert sides["good"].report.lines()[-1] == "1 row dropped: another completion of the row was"
    with pytest.raises(ValueError, match="data.jsonl:1: the row has no 'weight'; it has 'question', 'good', "):
        load_sides(*files, completion_fields=("good", "bad"), seq_len=None, **options | dict(columns=("weight",)))
    with pytest.raises(ValueError, match="rows with several sides cannot be split"):
        load_sides(*files, completion_fields=("good", "bad"), seq_len=40, split_long=True)


def test_a_dataset_of_examples_made_elsewhere(tmp_path):
    loaded = load(tmp_path, ROWS)
    made = TokenizedDataset.of([(ids.tolist(), targets.tolist()) for ids, targets in loaded])
    assert made.fingerprint == loaded.fingerprint and made.report.tokens == loaded.report.tokens
    with pytest.raises(ValueError, match="columns label must have 1 values: one per example"):
        TokenizedDataset.of([([1, 2], [2, -100])], {"label": [1, 0]})
    with pytest.raises(ValueError, match="example 1 must have one target per token"):
        TokenizedDataset.of([([1, 2], [-100, -100])])


def test_options_reach_the_rows(tmp_path):
    rows = [{"question": "hello", "answer": "world"}]
    dataset = load(tmp_path, rows, prompt_field="question", completion_field="answer", train_on="all")
    assert dataset.report.target_tokens == len(dataset.input_ids) - 1


def test_fingerprint_depends_on_tokens_targets_and_borders(tmp_path):
    same = load(tmp_path, ROWS).fingerprint
    assert same == load(tmp_path, ROWS, seq_len=10_000).fingerprint and len(same) == 64
    others = [
        load(tmp_path, ROWS[::-1]),
        load(tmp_path, ROWS, train_on="all"),
        load(tmp_path, ROWS, train_on="last"),
        load(tmp_path, ROWS, seq_len=16),
        load(tmp_path, ROWS, seq_len=16, split_long=True),
    ]
    whole, half = load(tmp_path, ROWS[:1]), load(tmp_path, ROWS[:1], seq_len=8, split_long=True)
    assert whole.input_ids.equal(half.input_ids) and whole.targets.equal(half.targets)
    assert whole.fingerprint != half.fingerprint
    assert len({same, *(other.fingerprint for other in others)}) == 6


REAL = os.environ.get("HANDTUNE_TEST_DATA")


@pytest.mark.skipif(not REAL, reason="HANDTUNE_TEST_DATA is not set: no real tokenizers, no GSM8K")
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_gsm8k(tmp_path, name):
    """Real rows through real tokenizers: what is trained spells out the answers, in every format."""
    tokenizer = load_tokenizer(Path(REAL, "tokenizers", name))
    template = load_chat_template(Path(REAL, "tokenizers", name), tokenizer)
    gsm8k = Path(REAL, "gsm8k", "test.jsonl")
    answers = [json.loads(line) for line in gsm8k.read_text().splitlines()][:200]
    messages = [
        {"messages": [{"role": "user", "content": a["question"]}, {"role": "assistant", "content": a["answer"]}]}
        for a in answers
    ]
    (tmp_path / "chat.json").write_text(json.dumps(messages, indent=1))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    options = {"seq_len": None, "prompt_field": "question", "completion_field": "answer"}
    pairs = load_dataset(tmp_path / "pairs.jsonl", tokenizer, None, **options)
    chats = load_dataset(tmp_path / "chat.json", tokenizer, template, seq_len=None)
    end_of_turn = {"llama2": "</s>", "llama3": "<|eot_id|>"}[name]
    end_of_text = {"llama2": "</s>", "llama3": "<|end_of_text|>"}[name]
    for dataset, end in ((pairs, end_of_text), (chats, end_of_turn)):
        assert len(dataset) == 200 and len(dataset.report.lines()) == 1
        for (input_ids, targets), answer in zip(dataset, answers, strict=True):
            trained = targets[targets != IGNORE_INDEX].tolist()
            assert tokenizer.decode(trained, skip_special_tokens=False) == answer["answer"].strip() + end
            assert input_ids[0] == tokenizer.bos_id and (input_ids == tokenizer.bos_id).sum() == 1
            # One run of targets, but for the space that Llama 2's chat format puts before its end of turn.
            first, *_, last = (targets != IGNORE_INDEX).nonzero().flatten().tolist()
            assert last + 1 - first - len(trained) == (dataset is chats and name == "llama2")
