"""What goes wrong at the user's end: one clear message, exit status 2, no traceback, nothing lost."""

import json
import shutil

import pytest

from tests.tiny import make_checkpoint, run_recipe, sums, write_rows


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_checkpoint(folder / "base")
    write_rows(folder / "rows.jsonl", sums(6))
    return folder


def broken_checkpoint(name, folder, base):
    """A copy of the checkpoint with one thing wrong."""
    shutil.copytree(base, folder)
    if name == "truncated shard":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    if name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if name == "no weights":
        (folder / "model.safetensors").unlink()
    if name == "no config":
        (folder / "config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    change = {
        "wrong architecture": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        "other shape": {"intermediate_size": 128},
        "more layers": {"num_hidden_layers": 3},
    }.get(name)
    if change:
        (folder / "config.json").write_text(json.dumps(config | change))
    return folder


CHECKPOINTS = {
    "truncated shard": ["model.safetensors", "truncated"],
    "no tokenizer": ["tokenizer"],
    "no weights": ["model.safetensors"],
    "no config": ["config.json"],
    "wrong architecture": ["MistralForCausalLM", "LlamaForCausalLM"],
    "other shape": ["model.layers.1.mlp.down_proj.weight", "(32, 64)"],
    "more layers": ["missing", "model.layers.2.self_attn.q_proj.weight"],
}
DATA = {
    "missing file": (None, ["nothing.jsonl"]),
    "empty file": ("", ["empty"]),
    "malformed row": ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', [":2:"]),
    "unknown keys": ('{"question": "a", "answer": "b"}\n', [":1:", "question"]),
    "unknown role": (
        '{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        [":1:", "wizard"],
    ),
    "chat without template": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        None,
    ),
}
FLAGS = {
    "unknown flag": (["--learning-rate", "1"], ["learning-rate"]),
    "seq-len": (["--seq-len", "9000"], ["9000", "512"]),
    "target": (["--targets", "q_prj"], ["q_prj", "q_proj"]),
    "rank": (["--rank", "0"], ["--rank"]),
    "clip": (["--max-grad-norm", "-1"], ["--max-grad-norm -1"]),
    "learning rate": (["--lr", "-1"], ["error: --lr -1.0 must be a positive number\n"]),
    "batch size": (["--batch-size", "0"], ["error: --batch-size 0 must be at least 1\n"]),
    "device": (["--device", "cuda:7"], ["cuda:7"]),
    "model": (["--model", "no/such/folder"], ["no/such/folder"]),
    "chat format": (["--chat-format", "klingon"], ["klingon"]),
}


def assert_one_clear_error(done, words, output):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr + done.stdout, done.stderr
    assert not (output / "adapter").exists() and not list(output.glob("checkpoints/*"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(good, tmp_path, name):
    folder = broken_checkpoint(name, tmp_path / "broken", good / "base")
    done = run_recipe(
        *("lora_finetune", "--model", folder, "--data", good / "rows.jsonl", "--output", tmp_path / "run"), check=False
    )
    assert_one_clear_error(done, CHECKPOINTS[name], tmp_path / "run")


@pytest.mark.parametrize("name", [name for name in DATA if DATA[name][1]])
def test_bad_data(good, tmp_path, name):
    text, words = DATA[name]
    data = tmp_path / "nothing.jsonl"
    if text is not None:
        data.write_text(text)
    done = run_recipe(
        *("lora_finetune", "--model", good / "base", "--data", data, "--output", tmp_path / "run"), check=False
    )
    assert_one_clear_error(done, [*words, "nothing.jsonl"], tmp_path / "run")


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(good, tmp_path, name):
    flags, words = FLAGS[name]
    done = run_recipe(
        "lora_finetune",
        *("--model", good / "base", "--data", good / "rows.jsonl", "--output", tmp_path / "run", *flags),
        check=False,
    )
    assert_one_clear_error(done, words, tmp_path / "run")


def test_a_full_output_folder_of_another_run_is_refused(good, tmp_path):
    arguments = ["--model", good / "base", "--data", good / "rows.jsonl", "--output", tmp_path / "run"]
    run_recipe("lora_finetune", *arguments, "--max-steps", "1")
    saved = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    done = run_recipe("lora_finetune", *arguments, "--max-steps", "1", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--resume" in done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == saved
