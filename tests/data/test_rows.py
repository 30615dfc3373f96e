import gzip
import json

import pytest

from data.chat.templates import ChatTemplate
from data.json_rows import read_rows
from data.row_formats import Chat, Completion, Text, parse_row
from data.rows import IGNORE_INDEX, encode_row
from tests.data.chat.published_templates import CHATML, LLAMA3, VICUNA
from tests.data.tiny_tokenizer import TinyTokenizer

TOKENIZER = TinyTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def template(source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(source, "test", {"bos_token": "<s>", "eos_token": "</s>"}, tuple(TOKENIZER.special_tokens))


def encode(row: dict, source: str | None = CHATML, tokenizer=TOKENIZER, **options):
    encoded = encode_row(row, tokenizer, source and template(source), **options)
    assert len(encoded.input_ids) == len(encoded.targets)
    for i, target in enumerate(encoded.targets):
        assert target == IGNORE_INDEX or target == encoded.input_ids[i + 1]
    return encoded


def trained_text(encoded, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode([t for t in encoded.targets if t != IGNORE_INDEX], skip_special_tokens=False)


# Reading


def rows_of(tmp_path, content: str | bytes, name: str = "data.jsonl") -> list[tuple[int, dict]]:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(tmp_path / name))


def test_json_lines(tmp_path):
    assert rows_of(tmp_path, '{"text": "a"}\n\n  \r\n{"text": "b"}\r\n{"text": "c"}') == [
        (1, {"text": "a"}),
        (4, {"text": "b"}),
        (5, {"text": "c"}),
    ]
    assert rows_of(tmp_path, b"\xef\xbb\xbf\n" + '{"text": "\u2028\x85é"}'.encode()) == [(2, {"text": "\u2028\x85é"})]
    assert rows_of(tmp_path, gzip.compress(b'{"text": "a"}\n'), "data.jsonl.gz") == [(1, {"text": "a"})]


def test_json_array(tmp_path):
    text = '\ufeff\n [\n {"text":\n "a"}, {"text": "b"}\n\n,{"text": "c"}\n]\n\n'
    assert rows_of(tmp_path, text, "data.json") == [(3, {"text": "a"}), (4, {"text": "b"}), (6, {"text": "c"})]
    rows = [{"text": "x\ny" * i} for i in range(20)]
    assert [row for _, row in rows_of(tmp_path, json.dumps(rows))] == rows
    assert [line for line, _ in rows_of(tmp_path, json.dumps(rows, indent=1))] == list(range(2, 62, 3))


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "data.jsonl is empty: it holds no rows"),
        (" \n\n", "data.jsonl is empty: it holds no rows"),
        ("[\n]", "data.jsonl is empty: its array holds no rows"),
        (
            '{"text": "a"}\n{"text": }\n',
            "data.jsonl:2: not valid JSON (one object per line): Expecting value at column 10",
        ),
        ('{"text": \r\n', "data.jsonl:1: not valid JSON (one object per line): Expecting value at column 10"),
        (
            '{"text": "a\n',
            "data.jsonl:1: not valid JSON (one object per line): Unterminated string starting at column 10",
        ),
        ('{"text": "a"}\n["a"]\n', """data.jsonl:2: a row must be an object like {"text": …}, got ["a"]"""),
        ('{\n "text": "a"\n}\n', "data.jsonl:1: not valid JSON (one object per line): "),
        ('[{"text": "a"},\n{"text": "a"\n,]', "data.jsonl:3: not valid JSON: "),
        ('[{"text": "a"},\n{"text": "a"},\n]', "data.jsonl:3: not valid JSON: "),
        ('[{"text": "a"}\n{"text": "a"}]', 'data.jsonl:2: expected a comma or the end of the array, got "{"'),
        ('[{"text": "a"},\n\n"x"]', 'data.jsonl:3: a row must be an object like {"text": …}, got "x"'),
        ('[{"text": "a"}]\n{"text": "a"}', 'data.jsonl:1: expected a comma or the end of the array, got "]"'),
        (b'{"text": "a"}\n{"text": "\xe9"}', "data.jsonl:2: not UTF-8 text (byte 11 of the line)"),
        ("\ufeffhello".encode("utf-16"), "data.jsonl:1: not UTF-8 text (byte 1 of the line)"),
        ("[" * 100_000, "data.jsonl:1: not valid JSON: nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "data.jsonl:1: not valid JSON (one object per line): Exceeds the limit"),
    ],
)
def test_bad_files(tmp_path, content, expected):
    with pytest.raises(ValueError) as caught:
        rows_of(tmp_path, content)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: there is no such data file"):
        list(read_rows(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="is a folder; the data must be a JSON Lines file"):
        list(read_rows(tmp_path))
    with pytest.raises(ValueError, match="data.gz: broken gzip file after line 0"):
        rows_of(tmp_path, b'{"text": "a"}', "data.gz")
    with pytest.raises(ValueError, match="data.gz: broken gzip file after line"):
        rows_of(tmp_path, gzip.compress(b'{"text": "a"}\n' * 1000)[:-9], "data.gz")


# Formats


def test_formats():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parse_row({"messages": messages}) == Chat(messages)
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert parse_row({"conversations": sharegpt}) == Chat([{"role": "system", "content": "s"}, *messages])
    for alias in ("chatgpt", "bing", "assistant"):
        assert parse_row({"conversations": [{"from": alias, "value": "a"}]}) == Chat(messages[1:])
    assert parse_row({"conversations": messages}) == Chat(messages)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert parse_row({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "a b"
    assert parse_row({"prompt": "q", "completion": "a"}) == Completion("q", "a")
    assert parse_row({"question": "q", "answer": "a"}, "question", "answer") == Completion("q", "a")
    assert parse_row({"prompt": "q", "answer": "a", "completion": "no"}, None, "answer") == Completion("q", "a")
    assert parse_row({"prompt": messages[:1], "completion": messages[1:]}) == Chat(messages, first=1)
    assert parse_row({"text": ""}) == Text("")


def test_precedence_of_formats():
    row = {"text": "t"}
    assert isinstance(parse_row(row), Text)
    row |= {"instruction": "i", "output": "o"}
    assert parse_row(row).completion == "o"
    row |= {"prompt": "p", "completion": "c"}
    assert parse_row(row).completion == "c"
    row |= {"conversations": [{"from": "gpt", "value": "v"}]}
    assert parse_row(row).messages[0]["content"] == "v"
    row |= {"messages": [{"role": "assistant", "content": "m"}]}
    assert parse_row(row).messages[0]["content"] == "m"
    assert parse_row(row, "prompt").completion == "c"  # named columns win
    nulls = dict.fromkeys(("messages", "conversations", "prompt"))
    assert parse_row(row | nulls).completion == "o"  # null counts as absent


def test_alpaca_has_its_published_prompts():
    with_input = parse_row({"instruction": "Add {x}.", "input": "1 2", "output": "3"})
    assert with_input == Completion(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n"
        "### Response:",
        "3",
    )
    without = Completion(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSing.\n\n### Response:",
        "La",
    )
    for absent in ({"input": ""}, {"input": None}, {}):
        assert parse_row({"instruction": "Sing.", "output": "La"} | absent) == without


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            {"prompt": "q", "chosen": "a"},
            "unknown row format: it has 'prompt', 'chosen'; expected messages, conversations",
        ),
        ({}, "unknown row format: it has no keys; "),
        ({"text": None}, "unknown row format: it has 'text' (null); "),
        ({"messages": []}, "'messages' must be a list of messages with at least one, got []"),
        ({"messages": "hi"}, """'messages' must be a list of messages with at least one, got "hi\""""),
        ({"messages": ["hi"]}, 'messages[0] must be an object with role and content, got "hi"'),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role; it has 'content'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]},
            'unknown role "robot" in messages[1]; known are system, user, assistant, tool',
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, 'unknown role ["user"] in messages[0]'),
        ({"conversations": [{"from": "alien", "value": "x"}]}, 'unknown role "alien" in conversations[0]; known are '),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string, got nothing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be a string, got 3"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value must be a string, got nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part must be {"),
        ({"images": ["a.jpg"], "prompt": "x", "completion": "y"}, "the row has an image; these recipes train on text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content text must be a string, got nothing"),
        ({"prompt": "q", "completion": ["a"]}, 'completion must be a string, got ["a"]'),
        ({"prompt": 1, "completion": "a"}, "prompt must be a string, got 1"),
        ({"instruction": "i", "input": {}, "output": "o"}, "input must be a string, got {}"),
        ({"text": ["a"] * 100}, 'text must be a string, got ["a", "a"'),
        ({"text": "a\ud83d"}, "text holds half a character: \\ud83d without its other half"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "[]"}, "'tools' must be a list of JSON schemas"),
    ],
)
def test_bad_rows(row, expected):
    with pytest.raises(ValueError) as caught:
        encode(row)
    assert expected in str(caught.value) and len(str(caught.value)) < 300


def test_named_columns_must_be_there():
    with pytest.raises(ValueError, match="the row has no 'question' and 'answer'; it has 'question', 'text'"):
        parse_row({"question": "q", "text": "t"}, "question", "answer")


# Tokens and targets


def test_text():
    ids = [BOS, *TOKENIZER.encode("hello world"), EOS]
    for train_on in ("assistant", "last", "all"):
        encoded = encode({"text": "hello world"}, train_on=train_on)
        assert encoded.input_ids == ids
        assert encoded.targets == [*ids[1:], IGNORE_INDEX]
    assert encode({"text": "<s>hello world"}).input_ids == ids  # it has its BOS already
    assert encode({"text": ""}).input_ids == [BOS, EOS]
    without_bos = TinyTokenizer(adds_bos=False)
    assert encode({"text": "hello world"}, tokenizer=without_bos).input_ids == ids[1:]
    assert encode({"text": ""}, tokenizer=without_bos).targets == [IGNORE_INDEX]
    assert encode({"text": "a</s>b"}).input_ids == [BOS, *TOKENIZER.encode("a"), EOS, *TOKENIZER.encode("b"), EOS]
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        encode({"text": "a"}, tokenizer=TinyTokenizer(eos=None))


def test_prompt_and_completion():
    prompt, completion = TOKENIZER.encode("hello wo"), TOKENIZER.encode("rld")
    assert prompt + completion != TOKENIZER.encode("hello world")  # each is tokenised on its own
    row, length = {"prompt": "hello wo", "completion": "rld"}, len(prompt) + 1
    for train_on in ("assistant", "last"):
        encoded = encode(row, None, train_on=train_on)
        assert encoded.input_ids == [BOS, *prompt, *completion, EOS]
        assert encoded.targets == [IGNORE_INDEX] * (length - 1) + [*completion, EOS, IGNORE_INDEX]
    encoded = encode(row, train_on="all")
    assert encoded.targets == [*prompt, *completion, EOS, IGNORE_INDEX]
    assert (
        encode({"prompt": "<s>a", "completion": "b"}).input_ids == encode({"prompt": "a", "completion": "b"}).input_ids
    )
    only = encode({"prompt": "", "completion": "ab"}, tokenizer=TinyTokenizer(adds_bos=False))
    assert only.input_ids == [*TOKENIZER.encode("ab"), EOS] and only.targets == [*only.input_ids[1:], IGNORE_INDEX]
    assert trained_text(encode({"prompt": "hello", "completion": ""})) == "</s>"
    alpaca = encode({"instruction": "Sing.", "input": "", "output": "La 👩‍👩‍👧"})
    assert trained_text(alpaca) == "La 👩‍👩‍👧</s>"


def chat_row(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


@pytest.mark.parametrize("source", [CHATML, LLAMA3, VICUNA], ids=["chatml", "llama3", "vicuna"])
def test_chat_ids_equal_transformers(source):
    oracle = TOKENIZER.oracle(source)
    for row in (chat_row("hello", "world", "é 你好 🎉", "  👩‍👩‍👧\n"), chat_row("</s>", "<s> x"), chat_row("", "")):
        ids = oracle.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        encoded = encode(row, source)
        assert encoded.input_ids == ids
        assert encoded.input_ids.count(BOS) == ("<s>" in str(row)) + (source != CHATML)


def test_chat_targets_token_by_token():
    turn = [TOKENIZER.special_tokens[t] for t in ("<|im_start|>", "<|im_end|>")]
    newline = TOKENIZER.encode("\n")
    expected_ids, expected_mask = [], []
    for role, content in (("user", "hello"), ("assistant", "world"), ("user", "a"), ("assistant", "🎉")):
        header, body = TOKENIZER.encode(role + "\n"), TOKENIZER.encode(content)
        expected_ids += [turn[0], *header, *body, turn[1], *newline]
        trained = role == "assistant"
        expected_mask += [False] * (1 + len(header)) + [trained] * (len(body) + 1) + [False]
    assert len(TOKENIZER.encode("🎉")) == 4  # one token for each byte: all are targets
    encoded = encode(chat_row("hello", "world", "a", "🎉"))
    assert encoded.input_ids == expected_ids
    assert [target != IGNORE_INDEX for target in encoded.targets] == [*expected_mask[1:], False]
    assert trained_text(encoded) == "world<|im_end|>🎉<|im_end|>"
    assert trained_text(encode(chat_row("hello", "world", "a", "b"), train_on="last")) == "b<|im_end|>"
    everything = encode(chat_row("hello", "world"), train_on="all")
    assert everything.targets == [*everything.input_ids[1:], IGNORE_INDEX]
    nothing = encode(chat_row("hello"))
    assert set(nothing.targets) == {IGNORE_INDEX}


def test_a_token_on_the_edge_is_a_target():
    """The space before "world" is the template's, but the token " world" is the answer's."""
    assert len(TOKENIZER.encode(" world")) == 1
    colon = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    assert trained_text(encode(chat_row("hello", "world"), colon)) == " world<|im_end|>"


def test_a_bare_word_start_is_a_target():
    class SentencePieceLike(TinyTokenizer):
        def encode_with_spans(self, text):  # [INST] q [/INST] | "▁" over nothing | "你"
            return [5, 6, 7], [(0, len(text) - 1), (len(text) - 1, len(text) - 1), (len(text) - 1, len(text))]

    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode(chat_row("question", "你"), bare, SentencePieceLike()).targets == [6, 7, IGNORE_INDEX]


def test_chat_lists_as_prompt_and_completion():
    prompt = chat_row("hello", "not this", "again")["messages"]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "world"}]}
    assert trained_text(encode(row)) == "world<|im_end|>"


def test_unended_and_special_contents_are_told():
    plain = encode(chat_row("hello", "world"))
    assert (plain.unended, plain.special) == (False, None)
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert encode(chat_row("hello", "world"), endless).unended
    for row in (chat_row("x <|eot_id|>", "world"), {"prompt": "a", "completion": "<|eot_id|>"}):
        assert encode(row).special == "<|eot_id|>"
        with pytest.raises(ValueError, match=r"holds the special token '<\|eot_id\|>' .--on-special-content keep"):
            encode(row, on_special_content="error")
    assert encode({"text": "<|eot_id|>"}, on_special_content="error").special is None


def test_a_chat_needs_a_template():
    with pytest.raises(ValueError, match="no chat template; choose one with --chat-format llama2, llama3, chatml"):
        encode(chat_row("hello", "world"), None)
    with pytest.raises(ValueError, match="--train-on 'user' is not one of assistant, last, all"):
        encode({"text": "x"}, train_on="user")
