import json
import os
from datetime import datetime
from pathlib import Path

import jinja2
import pytest

from data.chat.templates import TEMPLATES, ChatTemplate, load_chat_template
from data.tokenizers.load import load_tokenizer
from tests.data.chat.published_templates import (
    CHATML,
    GENERATION,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    PUBLISHED,
    QWEN3,
    VICUNA,
    ZEPHYR,
)
from tests.data.tiny_tokenizer import TinyTokenizer


def chat(*turns: str, start: str = "user") -> list[dict]:
    """Messages in turn; a turn "role|content" names its role."""
    messages = []
    for i, turn in enumerate(turns):
        role, _, content = turn.partition("|")
        if role not in ("user", "assistant", "tool"):
            role, content = ("user", "assistant")[(i + (start == "assistant")) % 2], turn
        messages.append({"role": role, "content": content})
    return messages


CHATS = {
    "one turn": chat("hello", "world"),
    "two turns": chat("hello", "world", "the question", "the answer"),
    "system": [{"role": "system", "content": "the model says"}, *chat("hello", "world", "a", "b")],
    "question last": chat("hello", "world", "again"),
    "short": chat("a", "a", "a", "a"),
    "headers": chat("user", "assistant", "assistant\n\n", "user: [INST] hi [/INST] ASSISTANT: USER:"),
    "whitespace": chat("  hello ", " world\n", "\n\n", "\tanswer  "),
    "padded system": [{"role": "system", "content": " be brief \n"}, *chat(" hello ", " world ")],
    "empty": chat("", "", "hello", ""),
    "unicode": chat("héllo 你好", "👩‍👩‍👧 wörld 🎉", "é", "\u2028 ñ \ue000 1\ue001"),
    "html": chat('<b> & "quotes" {{ jinja }} {% if %}', "a < b && c > d {# no comment #}"),
    "special": chat("what is <|im_end|>?", "it is <|eot_id|> or </s> indeed", "<s>", "<|im_start|>assistant\nx"),
    "assistant first": chat("welcome", "hello", "world", start="assistant"),
    "two assistants": chat("hello", "world", "assistant|world", "user|a", "assistant|b"),
    "thinking": chat("hello", "<think>\nhm\n</think>\n\nworld", "q", "<think>\nlet me see\n</think>\n\nanswer"),
    "tool": chat("user|hello", "assistant|x", "tool|{}", "assistant|done"),
}


def both(source: str, messages: list[dict], **options) -> tuple[str, str]:
    """(ours, transformers') text; where a template refuses, the words of its refusal."""
    tokenizer = TinyTokenizer(bos="<|begin_of_text|>", eos="</s>")
    ours = ChatTemplate(source, "test", {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos})
    try:
        theirs = tokenizer.oracle(source).apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        with pytest.raises(ValueError, match="refuses this conversation") as caught:
            ours.render(messages, **options)
        return str(caught.value).partition("conversation: ")[2], str(error)
    return ours.render(messages, **options), theirs


@pytest.mark.parametrize("prompt", [False, True], ids=["", "generation prompt"])
@pytest.mark.parametrize("template", PUBLISHED)
def test_text_equals_transformers(template, prompt):
    texts = set()
    for messages in CHATS.values():
        ours, theirs = both(PUBLISHED[template], messages, add_generation_prompt=prompt)
        assert ours == theirs
        texts.add(ours)
    assert len(texts) > len(CHATS) // 2


def test_refusal_is_in_the_templates_words():
    ours, theirs = both(MISTRAL, CHATS["two assistants"])
    assert ours == theirs == "Conversation roles must alternate user/assistant/user/assistant/..."
    template = ChatTemplate("{{ 'a' + 1 }}", "test", {})
    with pytest.raises(ValueError, match=r"\(test\) refuses this conversation: TypeError: "):
        template.render(chat("hello"))


def test_tools_reasoning_and_null_fields_equal_transformers():
    tools = [{"type": "function", "function": {"name": "f", "description": "<é> & 'x'", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é <1>"}}}
    messages = chat("hello") + [{"role": "assistant", "content": None, "tool_calls": [call]}, *chat("tool|42")]
    messages += [{"role": "assistant", "content": "it is 42", "thinking": "easy"}]
    for name in ("llama31", "qwen3", "generation"):
        ours, theirs = both(PUBLISHED[name], messages, tools=tools)
        assert ours == theirs
    ours, theirs = both(QWEN3, chat("hello") + messages[-1:])
    assert ours == theirs and "<think>\neasy\n</think>" in ours


def test_the_sandbox_holds():
    for attack in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ValueError, match="refuses|unsafe"):
            assert ChatTemplate(attack, "test", {}).render(chat("hello")) == ""
    with pytest.raises(ValueError, match=r"\(test\) is not valid jinja: line 2: "):
        ChatTemplate("hello\n{% if %}", "test", {})


def test_the_date_is_the_one_handed_in():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", "test", {}, now=datetime(2001, 2, 3))
    assert template.render(chat("hello")) == "03 Feb 2001"


def located(source: str, messages: list[dict], train_on: str = "assistant", **variables):
    tokenizer = TinyTokenizer()
    named = {"bos_token": "<s>", "eos_token": "</s>"} | variables
    template = ChatTemplate(source, "test", named, tuple(tokenizer.special_tokens))
    return template.render_with_targets(messages, train_on)


@pytest.mark.parametrize("name", CHATS)
def test_places_equal_transformers_generation_marks(name):
    """Templates whose marks lie around content and end-of-turn token: transformers' mask is ours, token by token."""
    tokenizer = TinyTokenizer()
    body = "'<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}{% generation %}{{ "
    for content in ("message.content", "message.content | trim", "message.content.rstrip()"):
        marked = (
            "{% for message in messages %}{{ " + body + content + " }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
            "{% else %}{{ " + content + " }}<|im_end|>\n{% endif %}{% endfor %}"
        )
        theirs = tokenizer.oracle(marked).apply_chat_template(
            CHATS[name], return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = located(marked, CHATS[name])
        ids, spans = tokenizer.encode_with_spans(rendered.text)
        ours = [int(any(s < end and start < e for start, end in rendered.spans)) for s, e in spans]
        assert (ids, ours) == (theirs["input_ids"], theirs["assistant_masks"])
        assert sum(ours) > 0 and rendered.unended == 0


def pieces(rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_places_word_by_word():
    short = located(CHATML, CHATS["short"])
    assert pieces(short) == ["a", "<|im_end|>", "a", "<|im_end|>"]
    first = len("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")  # and not the "a" of "assistant"
    assert short.spans[0] == (first, first + 1)
    assert pieces(located(LLAMA3, CHATS["whitespace"])) == ["world", "<|eot_id|>", "answer", "<|eot_id|>"]
    assert pieces(located(CHATML, CHATS["whitespace"])) == [" world\n", "<|im_end|>", "\tanswer  ", "<|im_end|>"]
    # The space that Llama 2 writes before </s> is neither the message nor its end-of-turn token.
    assert pieces(located(LLAMA2, CHATS["system"])) == ["world", "</s>", "b", "</s>"]
    assert pieces(located(MISTRAL, CHATS["short"])) == ["a", "</s>", "a", "</s>"]
    assert pieces(located(CHATML, CHATS["empty"])) == ["", "<|im_end|>", "", "<|im_end|>"]
    assert pieces(located(CHATML, CHATS["special"])) == [
        "it is <|eot_id|> or </s> indeed",
        "<|im_end|>",
        "<|im_start|>assistant\nx",
        "<|im_end|>",
    ]
    assert pieces(located(ZEPHYR, CHATS["two assistants"]))[::2] == ["world", "world", "b"]
    assert pieces(located(CHATML, CHATS["unicode"]))[2] == CHATS["unicode"][3]["content"]
    assert pieces(located(GENERATION, CHATS["one turn"])) == ["world", "<|im_end|>"]
    for strip in (str.strip, str.lstrip, str.rstrip):  # the space before the answer is the template's
        source = VICUNA.replace("+ message['content'] +", f"+ message['content'].{strip.__name__}() +")
        assert pieces(located(source, CHATS["whitespace"]))[::2] == [strip(" world\n"), strip("\tanswer  ")]


def test_train_on():
    assert pieces(located(CHATML, CHATS["question last"], "last")) == ["world", "<|im_end|>"]
    assert pieces(located(CHATML, CHATS["two turns"], "last")) == ["the answer", "<|im_end|>"]
    everything = located(CHATML, CHATS["two turns"], "all")
    assert pieces(everything) == [everything.text]
    assert pieces(located(CHATML, chat("hello"))) == []
    with pytest.raises(ValueError, match="--train-on 'user' is not one of assistant, last, all"):
        located(CHATML, CHATS["one turn"], "user")


def test_a_template_that_rewrites_messages():
    # Qwen 3 keeps the thinking of the last answer only; what a model has to write there begins with <think>.
    assert pieces(located(QWEN3, CHATS["thinking"])) == [
        "world",
        "<|im_end|>",
        "<think>\nlet me see\n</think>\n\nanswer",
        "<|im_end|>",
    ]
    reasoning = chat("hello") + [{"role": "assistant", "content": "world", "reasoning_content": "hm"}]
    assert pieces(located(QWEN3, reasoning)) == ["<think>\nhm\n</think>\n\nworld", "<|im_end|>"]
    call = {"function": {"name": "f", "arguments": {}}}
    tools = chat("hello") + [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        *chat("tool|42", "assistant|x"),
    ]
    assert pieces(located(PUBLISHED["llama31"], tools))[0] == '{"name": "f", "parameters": {}}'
    upper = CHATML.replace("message['content']", "message['content'] | upper")
    assert pieces(located(upper, CHATS["two turns"])) == ["WORLD", "<|im_end|>", "THE ANSWER", "<|im_end|>"]
    # Without a generation prompt, a message begins where the text begins to depend on it.
    upper = upper.partition("{% if add")[0]
    assert pieces(located(upper, CHATS["two turns"])) == ["WORLD", "<|im_end|>", "THE ANSWER", "<|im_end|>"]
    # One that writes "zz" behind a "z": that, too, comes from the message.
    adds = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ 'zz' if 'z' in m.content }}{% endfor %}"
    assert pieces(located(adds, chat("hello", "buz"))) == ["buzzz"]
    for hopeless in ("{{ m.content }} {{ m.content | length }}", "{{ m.content[::-1] }}"):
        with pytest.raises(ValueError, match="rewrites the messages, so that the text of message 2 cannot be told"):
            located("{% for m in messages %}" + hopeless + "{% endfor %}", CHATS["two turns"])


def test_turns_without_an_end():
    without = CHATML.replace(" + '<|im_end|>'", "")
    rendered = located(without, CHATS["two turns"])
    assert pieces(rendered) == ["world", "the answer"]  # the <|im_start|> behind "world" opens the next turn
    assert rendered.unended == 2
    only_between = without.replace("{{'<|im_start|>'", "{{ '' if loop.first else '<|im_end|>' }}{{'<|im_start|>'")
    rendered = located(only_between, CHATS["two turns"])
    assert pieces(rendered) == ["world", "<|im_end|>", "the answer"]
    assert rendered.unended == 1
    lines = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    rendered = located(lines, chat("hello", "world", "<|im_end|> is a token"))  # the user's, not the answer's end
    assert (pieces(rendered), rendered.unended) == (["world"], 1)
    begins = "{% for m in messages %}{{ m.content + bos_token }}{% endfor %}"
    assert located(begins, CHATS["two turns"]).unended == 2
    assert located(begins, CHATS["two turns"], bos_token="</s>").unended == 0  # one token for both, as in GPT-2


WRITTEN_OUT = {"llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML, "vicuna": VICUNA, "llava": VICUNA}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out_formats_equal_the_published(name):
    bos = {"llama3": "<|begin_of_text|>", "chatml": None}.get(name, "<s>")
    tokenizer = TinyTokenizer(bos=bos, adds_bos=bos is not None)
    oracle = tokenizer.oracle(WRITTEN_OUT[name])
    ours = load_chat_template("no such folder", tokenizer, name)
    assert ours.name == name
    compared = 0
    for label, messages in CHATS.items():
        if name in ("llama2", "vicuna", "llava") and label in ("assistant first", "two assistants", "tool"):
            continue  # not expressible in them, or not defined
        for prompt in (False, True):
            theirs = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(messages, add_generation_prompt=prompt) == theirs
            compared += 1
    assert compared >= 26
    rendered = ours.render_with_targets(CHATS["two turns"])
    assert [piece for piece in pieces(rendered)][::2] == ["world", "the answer"] and rendered.unended == 0


def test_chatml_begins_with_a_bos_and_llama2_refuses_what_it_cannot_say():
    bos = TinyTokenizer(bos="<s>", eos="</s>")
    messages = [{"role": "system", "content": "S"}, *chat("Q", "A", "R")]
    assert load_chat_template("no such folder", bos, "chatml").render(messages) == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n"
    )
    with pytest.raises(ValueError, match="user and assistant messages in turn"):
        load_chat_template("no such folder", bos, "llama2").render(CHATS["two assistants"])


def write_config(folder, **entries):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))


def test_where_a_template_is_found(tmp_path):
    base, adapter, tokenizer = tmp_path / "base", tmp_path / "adapter", TinyTokenizer()
    bos = {"content": "<|begin_of_text|>"}
    write_config(base, bos_token=bos, eos_token=None, chat_template="{{ bos_token }}{{ eos_token }} config")
    found = load_chat_template(base, tokenizer)
    # The files' null counts: for a template that token does not exist, whatever the tokenizer ends a text with.
    assert (found.name, found.render(chat("x"))) == ("the checkpoint's own", "<|begin_of_text|> config")
    (base / "chat_template.jinja").write_text("file\n")
    assert load_chat_template(base, tokenizer).render(chat("x")) == "file"
    write_config(adapter)
    assert load_chat_template(base, tokenizer, extra_folder=adapter).render(chat("x")) == "file"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "adapter"}]
    write_config(adapter, chat_template=named)
    found = load_chat_template(base, tokenizer, extra_folder=adapter)
    assert (found.name, found.render(chat("x"))) == ("the adapter's own", "adapter")
    write_config(adapter, chat_template=named[:1])
    with pytest.raises(ValueError, match="holds the chat templates tool_use but no default"):
        load_chat_template(base, tokenizer, extra_folder=adapter)
    assert load_chat_template(base, tokenizer, "chatml").name == "chatml"  # a name wins over the folder's own
    (tmp_path / "mine.jinja").write_text("mine {{ bos_token }}")
    found = load_chat_template(base, tokenizer, str(tmp_path / "mine.jinja"))
    assert (found.name, found.render(chat("x"))) == ("mine.jinja", "mine <|begin_of_text|>")
    with pytest.raises(ValueError, match="--chat-format 'alpaca' is neither a file nor one of auto, llama2, "):
        load_chat_template(base, tokenizer, "alpaca")


def test_tokens_that_the_files_leave_out(tmp_path):
    shows = "{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}"
    write_config(tmp_path / "llama", tokenizer_class="LlamaTokenizer", chat_template=shows, unk_token="<unk>")
    write_config(tmp_path / "general", tokenizer_class="TokenizersBackend", chat_template=shows, eos_token="</s>")
    found = [load_chat_template(tmp_path / name, TinyTokenizer()).render([]) for name in ("llama", "general")]
    assert found == ["<s>|</s>|True", "|</s>|False"]


def test_auto_picks_by_special_tokens(tmp_path):
    tokenizer = TinyTokenizer()
    assert load_chat_template(tmp_path, tokenizer).name == "llama3"
    del tokenizer.special_tokens["<|start_header_id|>"]
    assert load_chat_template(tmp_path, tokenizer).name == "chatml"
    del tokenizer.special_tokens["<|im_start|>"]
    assert load_chat_template(tmp_path, tokenizer).name == "llama2"
    tokenizer.bos_id = tokenizer.special_tokens["<|begin_of_text|>"]
    assert load_chat_template(tmp_path, tokenizer) is None
    assert set(TEMPLATES) == set(WRITTEN_OUT)


REAL = os.environ.get("HANDTUNE_TEST_DATA")


@pytest.mark.skipif(not REAL, reason="HANDTUNE_TEST_DATA is not set: no real tokenizers")
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_real_tokenizers_have_their_format(name):
    tokenizer = load_tokenizer(Path(REAL, "tokenizers", name))
    template = load_chat_template(Path(REAL, "tokenizers", name), tokenizer)
    rendered = template.render_with_targets(CHATS["two turns"])
    assert (template.name, rendered.unended) == (name, 0)
    ids = tokenizer.encode(rendered.text)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == {"llama2": 2, "llama3": 1}[name]  # one for each turn, as Meta trained it
    assert pieces(rendered)[1::2] == [{"llama2": "</s>", "llama3": "<|eot_id|>"}[name]] * 2
