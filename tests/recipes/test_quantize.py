"""Every kind of frozen base by the recipes: --quantize int8, int4, float8 (NF4: test_memory_options.py)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from recipes.benchmarks import quantizers
from tests.tiny import ROOT, losses, make_checkpoint, read_metrics, run_recipe, sums, write_rows

KINDS = ("int8", "int4", "float8")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    make_checkpoint(folder / "base")
    write_rows(folder / "rows.jsonl", sums(24))
    for kind in (*KINDS, "nf4"):
        run_recipe("merge", "--model", folder / "base", "--output", folder / kind, "--quantize", kind)
    return folder


def train(base, output, *flags, model="base", recipe="lora_finetune", steps=6):
    return run_recipe(
        recipe,
        *("--model", base / model, "--data", base / "rows.jsonl", "--eval-data", base / "rows.jsonl"),
        *("--output", output, "--device", "cpu", "--rank", "4", "--lr", "3e-3", "--seq-len", "64", "--epochs", "9"),
        *("--batch-size", "2", "--max-steps", steps, "--save-every", "3", "--schedule", "constant", *flags),
    )


@pytest.fixture(scope="module")
def plain(base):
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = base / f"plain-{kind}"
            train(base, made[kind], "--quantize", kind, "--activations", "none")
        return made[kind]

    return run


@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
def test_equals_lora_over_the_dequantised_folder(base, plain, tmp_path, kind):
    train(base, tmp_path / "dense", model=kind)
    assert losses(tmp_path / "dense") == pytest.approx(losses(plain(kind)), rel=1e-5)
    train(base, tmp_path / "other")
    assert losses(tmp_path / "other") != pytest.approx(losses(plain(kind)), rel=1e-5)
    adapters = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (plain(kind), tmp_path / "dense")]
    assert max((adapters[0][name] - adapters[1][name]).abs().max() for name in adapters[0]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_opens(base, plain, tmp_path, kind):
    adapter = plain(kind) / "adapter"
    (expected,) = [row["eval_loss"] for row in read_metrics(plain(kind)) if "eval_loss" in row]
    flags = ("--data", base / "rows.jsonl", "--device", "cpu")
    merge = ("merge", "--adapter", adapter)
    run_recipe(*merge, "--model", base / "base", "--quantize", kind, "--output", tmp_path / "merged")
    for model, more in (
        (base / "base", ("--adapter", adapter, "--quantize", kind)),
        (base / kind, ("--adapter", adapter)),
        (tmp_path / "merged", ()),
    ):
        found = json.loads(run_recipe("evaluate", "--model", model, *more, *flags).stdout)["loss"]
        assert found == pytest.approx(expected, rel=1e-5)
    generate = ("generate", "--model", base / "base", "--adapter", adapter, "--quantize", kind, "--device", "cpu")
    run_recipe(*generate, "--prompt", "3 + 6 =", "--raw", "--max-new-tokens", "3")


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit_and_with_a_quantised_head(base, plain, tmp_path, kind):
    flags = ("--quantize", kind, "--activations", "none")
    train(base, tmp_path / "run", *flags, steps=3)
    train(base, tmp_path / "run", *flags, "--resume")
    assert losses(tmp_path / "run") == losses(plain(kind))
    saved = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (plain(kind), tmp_path / "run")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    train(base, tmp_path / "head", *flags, "--quantize-head")
    assert losses(tmp_path / "head") == pytest.approx(losses(plain(kind)), rel=0.1)
    assert losses(tmp_path / "head") != losses(plain(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_quantises_what_it_leaves(base, tmp_path, kind):
    train(base, tmp_path / "run", "--method", "pissa", "--quantize", kind, "--quantize-head", recipe="peft_finetune")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_the_table_is_what_the_command_measures(capsys):
    """The page shows the committed figures, and measuring on a smaller matrix gives nearly the same."""
    committed = json.loads((ROOT / "recipes/benchmarks/quantizers.json").read_text())["kinds"]
    readme = (ROOT / "recipes/benchmarks/README.md").read_text()
    again = quantizers.main(quantizers.Config(size=512))["kinds"]
    capsys.readouterr()
    for name, row in committed.items():
        errors = " | ".join(f"{100 * row[on]['error']:.2f} %" for on in ("normal", "checkpoint"))
        assert f"| {name} | {row['normal']['bits']:.2f} | {errors} |" in readme
        assert again[name]["checkpoint"] == pytest.approx(row["checkpoint"], rel=1e-6)
        assert again[name]["normal"]["error"] == pytest.approx(row["normal"]["error"], rel=0.2)
