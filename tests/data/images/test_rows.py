"""Rows with images: where the images come from, what the template makes of them, tokens and targets."""

import copy
from pathlib import Path

import pytest
import torch

from data.chat.templates import TEMPLATES, ChatTemplate, load_chat_template
from data.images.files import ImageFiles, load_image
from data.row_formats import parse_row
from data.rows import IGNORE_INDEX, encode_row
from tests.data.chat.published_templates import CHATML, LLAMA2, PUBLISHED, VICUNA
from tests.data.images.tiny_vision import LLAVA, TOKENS, draw, folder, llava_processor, parts
from tests.data.tiny_tokenizer import TinyTokenizer

TOKENIZER, TEMPLATE, PROCESSOR = parts()
IMAGE = PROCESSOR.token_id


class Files(ImageFiles):
    """Of which none is opened: this processor makes the same of all sizes."""

    def check(self, name):
        return 50, 30


FILES = Files(PROCESSOR, "rows.jsonl", Path())


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(path: str | None = None) -> dict:
    return {"type": "image", "path": path} if path else {"type": "image"}


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def assistant(*content) -> dict:
    return {"role": "assistant", "content": list(content)}


def parse(row: dict):
    return parse_row(row, with_images=True)


def encode(row: dict, template=TEMPLATE, **options):
    encoded = encode_row(row, TOKENIZER, template, image_files=FILES, **options)
    assert len(encoded.input_ids) == len(encoded.targets)
    for i, target in enumerate(encoded.targets):
        assert target == IGNORE_INDEX or (target == encoded.input_ids[i + 1] and target != IMAGE)
    return encoded


def trained_text(encoded) -> str:
    return TOKENIZER.decode([t for t in encoded.targets if t != IGNORE_INDEX], skip_special_tokens=False)


# Formats


def test_messages_name_their_images():
    row = {"messages": [user(image("a.png"), text("hi"), image("b.png")), assistant(text("yes"))]}
    parsed = parse(row)
    assert parsed.images == ("a.png", "b.png")
    assert parsed.messages == [user(image(), text("hi"), image()), {"role": "assistant", "content": "yes"}]
    for part in (
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": {"path": "a.png", "bytes": None}},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "url": "file://a.png", "path": None, "text": None},
    ):
        parsed = parse({"messages": [user(part, text("hi"))]})
        assert parsed.images == ("a.png",) and parsed.messages == [user(image(), text("hi"))]


def test_llava_rows_list_their_images():
    turns = [
        {"from": "human", "value": "<image>\nwhat is this?"},
        {"from": "gpt", "value": "a dog"},
        {"from": "human", "value": "sure?"},
    ]
    parsed = parse({"id": 1, "image": "a.png", "conversations": turns})
    assert parsed.images == ("a.png",)
    assert [m["content"] for m in parsed.messages] == [[image(), text("what is this?")], "a dog", "sure?"]
    assert parse({"image": ["a.png"], "conversations": turns}) == parsed
    assert parse({"images": [{"path": "a.png"}], "conversations": turns}) == parsed
    turns[0]["value"], turns[2]["value"] = "what is\n<image>\n", "and <image><image>, here?"
    parsed = parse({"image": ["a.png", "b.png", "c.png"], "conversations": turns})
    assert parsed.images == ("a.png", "b.png", "c.png")
    assert parsed.messages[0]["content"] == [text("what is"), image()]
    assert parsed.messages[2]["content"] == [text("and "), image(), image(), text(", here?")]


def test_a_list_of_images_goes_with_every_format():
    for row in (
        {"images": ["a.png"], "messages": [user(image(), text("hi"))]},
        {"images": ["a.png"], "messages": [user(text("<image>\nhi"))]},
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>hi"}]},
        {"images": ["a.png"], "prompt": [user(image(), text("hi"))], "completion": [assistant(text("yes"))]},
    ):
        parsed = parse(row)
        assert parsed.images == ("a.png",) and parsed.messages[0] == user(image(), text("hi"))
    assert parse({"image": "a.png", "prompt": "<image>\nhi", "completion": "yes"}).images == ("a.png",)
    assert parse({"image": "a.png", "text": "<image> a dog"}).images == ("a.png",)
    assert parse({"image": "a.png", "instruction": "see", "input": "<image>", "output": "a"}).images == ("a.png",)


def test_rows_without_images():
    for row in ({"text": "hello"}, {"messages": [user(text("a"), text("b")), assistant(text("c"))]}):
        for absent in ({}, {"image": None}, {"images": []}):
            assert parse(row | absent) == parse_row(row) and parse(row | absent).images == ()
    assert parse({"messages": [user(text("a"), text("b"))]}).messages[0]["content"] == "ab"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": [user(image())]}, "messages[0] holds an image without a file; expected"),
        ({"messages": [user({"type": "image", "path": 3})]}, "messages[0].content path must be the path of a file"),
        ({"messages": [user({"type": "image", "image": ""})]}, 'must be the path of a file, got ""'),
        (
            {"messages": [user({"type": "image", "path": "a", "url": "b"})]},
            "messages[0] names the file of an image twice: path, url",
        ),
        ({"images": ["a"], "messages": [user(image("b"))]}, "messages[0] names the file of an image twice: path and"),
        ({"image": "a", "images": ["b"], "text": "<image>"}, "the row has both 'image' and 'images'; leave one"),
        ({"image": 3, "text": "<image>"}, "image[0] must be the path of a file, got 3"),
        ({"image": "a", "text": "no place"}, "1 image, but 0 <image> in the text to stand for them"),
        ({"image": ["a", "b"], "conversations": [{"from": "human", "value": "<image>"}]}, "2 images, but 1 <image> in"),
        ({"images": [], "messages": [user(image())]}, "0 images, but 1 <image> in the text"),
        ({"conversations": [{"from": "human", "value": "<image>\nhi"}]}, "0 images, but 1 <image> in the text"),
        ({"messages": [user(image("a"), text("<image>"))]}, "1 image, but 2 <image> in the text"),
        ({"text": "an <image> tag"}, "0 images, but 1 <image> in the text"),
        ({"prompt": "an <image> tag", "completion": "x"}, "0 images, but 1 <image> in the text"),
        ({"messages": [assistant(image("a"))]}, "messages[0] is an assistant message with an image in it"),
        (
            {"image": "a", "conversations": [{"from": "gpt", "value": "<image>"}]},
            "conversations[0] is an assistant message with an image in it",
        ),
        ({"messages": [user({"type": "video", "path": "a"})]}, "a part must be {"),
    ],
)
def test_bad_rows(row, expected):
    with pytest.raises(ValueError) as caught:
        encode(row)
    assert expected in str(caught.value)


def test_a_text_model_refuses_images():
    with pytest.raises(ValueError, match="holds an image; these recipes train on text only"):
        parse_row({"messages": [user(image("a.png"))]})
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nhi"}]}
    with pytest.raises(ValueError, match="the row has an image; these recipes train on text only"):
        parse_row(row)  # or it would learn to answer about pictures that it has not seen
    for nothing in (None, "", []):
        assert parse_row(row | {"image": nothing}).messages == [{"role": "user", "content": "<image>\nhi"}]


def test_a_literal_placeholder_is_special_content():
    row = {"messages": [user(image("a.png"), text("an <image> tag")), assistant(text("x"))]}
    with pytest.raises(ValueError, match="holds the special token '<image>'"):
        encode(row, on_special_content="error")
    llava = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "x"}],
    }
    pair = {"image": "a.png", "prompt": "<image>\nhi", "completion": "x"}
    for row in (llava, pair):
        assert encode(row, on_special_content="error").special is None
        assert encode(row).images == ("a.png",)
    pair["completion"] = "</s>"
    assert encode(pair).special == "</s>"


# Tokens and targets, against transformers

CHATS = {
    "no image": [user(text("hello")), assistant(text("world"))],
    "one image": [user(image("a.png"), text("hello")), assistant(text("world"))],
    "behind the words": [user(text("hello"), image("a.png")), assistant(text("world"))],
    "two images": [user(image("a.png"), text("a"), image("b.png"), text("b")), assistant(text("world"))],
    "two turns": [
        {"role": "system", "content": [text("the model says")]},
        user(image("a.png"), text("hello")),
        assistant(text(" world ")),
        user(text("again"), image("b.png")),
        assistant(text("yes")),
    ],
    "only an image": [user(image("a.png")), assistant(text("a dog"))],
}


@pytest.mark.parametrize("name", CHATS)
def test_ids_and_pixel_values_of_a_llava_processor(tmp_path, name):
    for file, seed in (("a.png", 1), ("b.png", 2)):
        draw(50, 30, seed=seed).save(tmp_path / file)
    encoded = encode({"messages": CHATS[name]})
    oracle = copy.deepcopy(CHATS[name])
    for message in oracle:
        for part in message["content"]:
            if part["type"] == "image":
                part["path"] = str(tmp_path / part["path"])
    expected = llava_processor().apply_chat_template(oracle, tokenize=True, return_dict=True, return_tensors="pt")
    assert encoded.input_ids[0] == TOKENIZER.bos_id  # which the template does not write
    assert encoded.input_ids == expected["input_ids"][0].tolist()
    assert encoded.input_ids.count(IMAGE) == TOKENS * len(encoded.images)
    if encoded.images:
        pixels = torch.cat([load_image(tmp_path / file, PROCESSOR) for file in encoded.images])
        torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=1e-6)
        assert encoded.images_end == len(encoded.input_ids) - encoded.input_ids[::-1].index(IMAGE)
    else:
        assert encoded.images_end == 0
    answers = " ".join(m["content"][0]["text"] for m in oracle if m["role"] == "assistant")
    assert trained_text(encoded).split() == answers.split()
    assert encoded.unended  # this published template writes no end of turn


def test_llava_rows_give_the_same_tokens_as_messages():
    row = {
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nhello"},
            {"from": "gpt", "value": "world"},
            {"from": "human", "value": "again\n<image>"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    messages = [
        user(image("a.png"), text("hello")),
        assistant(text("world")),
        user(text("again"), image("b.png")),
        assistant(text("yes")),
    ]
    for chat_format in ("auto", "llava", "vicuna", "chatml"):
        template = parts(chat_format)[1]
        assert encode(row, template) == encode({"messages": messages}, template)


def test_train_on_everything_leaves_image_tokens_out():
    for row in (
        {"messages": CHATS["two images"]},
        {"image": "a.png", "text": "<image>hello world"},
        {"image": "a.png", "prompt": "<image>\nhi", "completion": "yes"},
    ):
        encoded = encode(row, train_on="all")
        after = [token if token != IMAGE else IGNORE_INDEX for token in encoded.input_ids[1:]]
        assert encoded.targets == [*after, IGNORE_INDEX]
        # what follows an image is predicted from its last token
        assert any(t != IGNORE_INDEX and i == IMAGE for i, t in zip(encoded.input_ids, encoded.targets, strict=True))


def test_prompt_and_completion():
    encoded = encode({"image": "a.png", "prompt": "<image>\nhi", "completion": "yes"})
    plain = encode_row({"prompt": "<image>\nhi", "completion": "yes"}, TOKENIZER, None)
    assert encoded.input_ids == PROCESSOR.expand(plain.input_ids, ["a.png"], FILES.check, TOKENIZER)[0]
    assert trained_text(encoded) == "yes</s>" and not encoded.chat
    assert encoded.images_end == encoded.input_ids.index(IMAGE) + TOKENS


def test_text_rows_come_out_as_without_a_processor():
    for row in ({"text": "hello"}, {"prompt": "a", "completion": "b"}):
        assert encode(row) == encode_row(row, TOKENIZER, TEMPLATE)
    row, template = {"messages": CHATS["no image"]}, parts("llava")[1]  # which writes the BOS
    assert encode(row, template) == encode_row(row, TOKENIZER, template)
    assert encode(row, template).input_ids.count(TOKENIZER.bos_id) == 1


# Templates


def test_the_written_out_llava_format():
    template = load_chat_template("no such folder", TinyTokenizer(), "llava")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    messages = [
        user(image(), text("Q"), image()),
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    expected = f"<s>{system} USER: <image>\n<image>\nQ ASSISTANT: A</s>USER: R ASSISTANT:"
    assert template.render(messages, add_generation_prompt=True) == expected
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    vicuna = load_chat_template("no such folder", TinyTokenizer(), "vicuna")
    for messages in (plain, plain[1:], [*plain, {"role": "assistant", "content": " A "}]):
        assert template.render(messages) == vicuna.render(messages)
    encoded = encode({"messages": CHATS["two turns"]}, template)
    assert trained_text(encoded) == " world </s> yes</s>" and not encoded.unended


@pytest.mark.parametrize("source", [CHATML, VICUNA, LLAMA2], ids=["chatml", "vicuna", "llama2"])
def test_templates_of_text_models_get_strings(source):
    template = ChatTemplate(source, "test", {"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", "</s>"))
    messages = [user(image(), text("Q"), text("R"), image()), {"role": "assistant", "content": "A"}]
    flat = [{"role": "user", "content": "<image>\nQR\n<image>"}, {"role": "assistant", "content": "A"}]
    assert template.render(messages) == template.render(flat)
    assert template.render([user(image(), image())]) == template.render(
        [{"role": "user", "content": "<image>\n<image>"}]
    )


def test_templates_that_read_only_lists_get_lists():
    template = ChatTemplate(LLAVA, "test", {})
    assert template.render([{"role": "user", "content": "Q"}]) == "USER: Q "  # as a string it would be lost
    either = (
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | map(attribute='text') | join }}{% endif %}"
    )
    template = ChatTemplate("{% for m in messages %}" + either + "{% endfor %}", "test", {})
    assert template.render([{"role": "user", "content": "Q"}, user(text("R"), text("S"))]) == "QRS"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_templates_are_read_as_such(name):
    template = ChatTemplate(PUBLISHED[name], name, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template._reads[0]


def test_where_a_vision_checkpoint_keeps_its_template(tmp_path):
    assert TEMPLATE.name == "the checkpoint's own" and TEMPLATE.source == LLAVA
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from the processor"}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "from the tokenizer"}')
    assert load_chat_template(tmp_path, TOKENIZER).source == "from the processor"


def test_a_checkpoint_without_template_gets_the_llava_format(tmp_path):
    tokenizer = TinyTokenizer()
    for token in ("<|start_header_id|>", "<|im_start|>"):
        del tokenizer.special_tokens[token]
    assert load_chat_template(tmp_path, tokenizer).name == "llama2"
    tokenizer.special_tokens["<image>"] = 400
    assert load_chat_template(tmp_path, tokenizer).name == "llava"
    assert folder() and "llava" in TEMPLATES
