"""New tokens: found in texts, saved, and the same in transformers."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from data.tokenizers.load import load_tokenizer
from data.tokenizers.new_tokens import add_tokens, read_tokens, save_tokenizer, tokenizer_folder
from tests.tiny import make_checkpoint, test_data

TEXTS = ["hi <tool> there</tool> x", "<tool></tool>", "how many apples<tool>", "the <tool>"]
NEW = ["<tool>", "</tool>"]


def extended(source, target, embeddings):
    tokenizer, rows = add_tokens(load_tokenizer(source), NEW, embeddings)
    save_tokenizer(target, tokenizer, source)
    again = load_tokenizer(target)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
    return tokenizer, rows


def test_equals_transformers(tmp_path):
    make_checkpoint(tmp_path / "base")
    size = load_tokenizer(tmp_path / "base").vocab_size
    tokenizer, rows = extended(tmp_path / "base", tmp_path / "new", size)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base")
    theirs.add_special_tokens({"additional_special_tokens": NEW})
    assert rows == theirs.convert_tokens_to_ids(NEW) == [size, size + 1]
    opened = AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == opened(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == "hi  there x"
    assert tokenizer_folder(tmp_path / "base", tmp_path / "new") == tmp_path / "new"
    assert tokenizer_folder(tmp_path / "new", tmp_path / "base") == tmp_path / "new"
    assert tokenizer_folder(tmp_path / "base", tmp_path) == tmp_path / "base"


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_tokenizers_without_a_json_file(tmp_path, name):
    source = test_data() / "tokenizers" / name
    before = load_tokenizer(source)
    tokenizer, rows = extended(source, tmp_path, before.vocab_size)
    assert rows == [before.vocab_size, before.vocab_size + 1] and set(rows) <= set(tokenizer.encode(TEXTS[0]))
    assert tokenizer.encode("What now?") == before.encode("What now?")


def test_rows_that_the_model_lacks_are_new_even_if_no_text_has_them(tmp_path):
    """A Llama tokenizer has an <unk> whether its folder names one or not."""
    make_checkpoint(tmp_path / "base")
    size = load_tokenizer(tmp_path / "base").vocab_size
    config = tmp_path / "base/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    _, rows = extended(tmp_path / "base", tmp_path / "new", size)
    assert rows == [size, size + 1, size + 2]


def test_known_tokens_and_spare_rows_are_used(tmp_path):
    make_checkpoint(tmp_path / "base")
    tokenizer = load_tokenizer(tmp_path / "base")
    assert add_tokens(tokenizer, ["<|im_end|>", "<new>"], 400)[1] == [3, tokenizer.vocab_size]
    assert add_tokens(tokenizer, [], 4) == (tokenizer, [])


def test_a_file_of_tokens(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text("<a>\n\n<b>\n")
    assert read_tokens([str(path)]) == ["<a>", "<b>"] and read_tokens(["<a>"]) == ["<a>"]
    for bad in (["<a>", "<a>"], [" <a>"], [""]):
        with pytest.raises(ValueError, match="given once"):
            read_tokens(bad)


def test_what_cannot_be_saved_is_an_error(tmp_path):
    make_checkpoint(tmp_path / "base")
    tokenizer, _ = add_tokens(load_tokenizer(tmp_path / "base"), NEW, 305)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    spec = json.loads((tmp_path / "other/tokenizer.json").read_text())
    spec["added_tokens"][1]["lstrip"] = True
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="cannot be saved with new tokens"):
        save_tokenizer(tmp_path / "new", tokenizer, tmp_path / "other")
