"""Every method of the table, by the recipe: it learns, what it saves gives the same loss, and it resumes."""

import ast
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizers.load import load_tokenizer
from modules.adapters.methods import METHODS, read_by
from tests.tiny import losses, make_checkpoint, read_metrics, run_recipe, sums, write_rows

RATES = {"ia3": 3e-2, "bitfit": 3e-2, "ln": 3e-2, "vera": 3e-2, "prompt": 3e-2, "prefix": 3e-2}
VIRTUAL = ("prompt", "p-tuning", "prefix")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    make_checkpoint(folder / "base")
    write_rows(folder / "rows.jsonl", sums(24))
    run_recipe("merge", "--model", folder / "base", "--output", folder / "nf4", "--quantize", "nf4")
    return folder


def evaluated(folder):
    (loss,) = [row["eval_loss"] for row in read_metrics(folder) if "eval_loss" in row]
    return loss


def train(base, output, method, *flags, steps=8, model="base"):
    sizes = {"rank": "4", "alpha": "8", "num_virtual_tokens": "4"}
    for name in sizes.keys() & set(read_by(method)):
        flags = (f"--{name}", sizes[name], *flags)
    return run_recipe(
        "peft_finetune",
        *("--model", base / model, "--data", base / "rows.jsonl", "--eval-data", base / "rows.jsonl"),
        *("--output", output, "--device", "cpu", "--method", method, "--epochs", "9"),
        *("--seq-len", "64", "--batch-size", "4", "--schedule", "constant", "--lr", RATES.get(method, 3e-3)),
        *("--save-every", "4", "--max-steps", steps, *flags),
    )


@pytest.mark.parametrize("method", METHODS)
def test_method(base, tmp_path, method):
    quantize = ("--quantize", "nf4") if method == "loftq" else ()
    train(base, tmp_path / "whole", method, *quantize)
    whole = losses(tmp_path / "whole")
    assert evaluated(tmp_path / "whole") < whole[0]

    flags = ("--model", base / "base", "--data", base / "rows.jsonl", "--device", "cpu", *quantize)
    found = json.loads(run_recipe("evaluate", *flags, "--adapter", tmp_path / "whole/adapter").stdout)["loss"]
    assert found == pytest.approx(evaluated(tmp_path / "whole"), rel=1e-5)

    train(base, tmp_path / "run", method, *quantize, steps=4)
    train(base, tmp_path / "run", method, *quantize, "--resume")
    assert losses(tmp_path / "run") == whole
    adapters = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0] | adapters[1])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "loftq"])
def test_over_nf4_packed_and_recomputed(base, tmp_path, method):
    train(base, tmp_path / "run", method, "--quantize", "nf4", "--packing", "--activations", "lean")
    assert evaluated(tmp_path / "run") < losses(tmp_path / "run")[0]


def test_the_recipe_is_lora_finetune_with_another_section_5(base, tmp_path):
    train(base, tmp_path / "run", "lora")
    run_recipe(
        "lora_finetune",
        *("--model", base / "base", "--data", base / "rows.jsonl", "--eval-data", base / "rows.jsonl"),
        *("--output", tmp_path / "lora", "--device", "cpu", "--rank", "4", "--alpha", "8", "--epochs", "9"),
        *("--seq-len", "64", "--batch-size", "4", "--schedule", "constant", "--lr", "3e-3", "--max-steps", "8"),
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "lora")


@pytest.mark.parametrize("method", VIRTUAL)
def test_generation_with_virtual_tokens(base, tmp_path, method):
    """The run's own sample, `generate.py` and a start from text, whose tokens are counted."""
    said = train(base, tmp_path / "run", method).stderr
    assert "4 virtual tokens in front of each of them" in said
    (sample,) = re.findall("evaluation loss .*; ('.*') → ('.*')", said)
    prompt, completion = (ast.literal_eval(part) for part in sample)
    assert prompt.endswith("0 + 0 =")
    flags = ("--model", base / "base", "--adapter", tmp_path / "run/adapter", "--raw", "--device", "cpu")
    generated = run_recipe("generate", *flags, "--prompt", "0 + 0 =", "--max-new-tokens", "64").stdout
    assert generated.removesuffix("\n") == completion


def test_a_prompt_from_text(base, tmp_path):
    """By default it has as many virtual tokens as the text has tokens."""
    text = "12 apples and 7 pears"
    tokens = len(load_tokenizer(base / "base").encode_prompt(text))
    for method, flags, count in (
        ("prompt", (), tokens),
        ("prefix", (), tokens),
        ("prompt", ("--num-virtual-tokens", 11), 11),
    ):
        output = tmp_path / f"{method}-{count}"
        run_recipe(
            "peft_finetune",
            *("--model", base / "base", "--data", base / "rows.jsonl", "--output", output, "--device", "cpu"),
            *("--method", method, "--max-steps", "0", "--prompt-init", "text", "--prompt-text", text, *flags),
        )
        assert len(load_file(output / "adapter/adapter_model.safetensors")["prompt_embeddings"]) == count
