"""Every option that saves memory or time trains as the recipe does without it: same losses, same result, resumable."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.tiny import losses, make_checkpoint, read_metrics, run_recipe, sums, write_rows

LORA = ("--rank", "4", "--lr", "3e-3")
FULL = ("--lr", "1e-3", "--max-grad-norm", "0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    make_checkpoint(folder / "base", num_hidden_layers=4)
    make_checkpoint(folder / "tied", num_hidden_layers=4, tie_word_embeddings=True)
    write_rows(folder / "rows.jsonl", sums(24))
    return folder


def train(base, output, recipe, *flags, steps=6, model="base", **options):
    return run_recipe(
        recipe,
        *("--model", base / model, "--data", base / "rows.jsonl", "--output", output, "--device", "cpu"),
        *("--eval-data", base / "rows.jsonl", "--eval-every", "4", "--seq-len", "64", "--batch-size", "2"),
        *("--epochs", "9", "--max-steps", steps, "--save-every", "3", *flags),
        **options,
    )


@pytest.fixture(scope="module")
def plain(base):
    """Runs without any option, each made once: their output folders."""
    made = {}

    def run(recipe, *flags, model="base"):
        key = (recipe, flags, model)
        if key not in made:
            made[key] = base / f"plain-{len(made)}"
            fused = ("--no-fused",) if recipe == "lora_finetune" else ()
            train(base, made[key], recipe, *flags, *fused, "--activations", "none", model=model)
        return made[key]

    return run


def check_same(run, reference, tolerance):
    assert losses(run) == pytest.approx(losses(reference), rel=tolerance)
    evaluations = [
        [row["eval_loss"] for row in read_metrics(folder) if "eval_loss" in row] for folder in (run, reference)
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=tolerance) and len(evaluations[0]) == 2
    norms = [[row["grad_norm"] for row in read_metrics(folder) if "loss" in row] for folder in (run, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=max(tolerance, 1e-4))


OPTIONS = {
    "fast": ("--no-fused", "--activations", "fast"),
    "offload": ("--no-fused", "--activations", "offload"),
    "every second block": ("--no-fused", "--activations", "lean", "--activations-every", "2"),
    "fused, fast": ("--activations", "fast"),
    "fused, lean": ("--activations", "lean"),
    "fused, offload, packed": ("--activations", "offload", "--packing"),
    "fused, offload with attention": ("--activations", "offload", "--activations-host-gib", "0.0001"),
    "fused, within a budget": ("--activations", "lean", "--activations-gib", "0.0001"),
    "streamed": ("--no-fused", "--weights", "stream"),
    "streamed fused, from disk": ("--weights", "disk", "--activations", "offload"),
    "embedding on the host": ("--no-fused", "--embedding", "host"),
    "moments on the host": ("--no-fused", "--optimizer", "adamw-host"),
    "everything": ("--weights", "stream", "--activations", "offload", "--optimizer", "adamw-host"),
}


OF_OTHER_KINDS = ("fast", "offload", "fused, lean", "streamed", "streamed fused, from disk")
CASES = [(option, kind) for option in OPTIONS for kind in ("none", "nf4")]
CASES += [(option, kind) for option in OF_OTHER_KINDS for kind in ("int8", "int4", "float8")]


@pytest.mark.parametrize(("option", "quantize"), CASES)
def test_lora(base, plain, tmp_path, option, quantize):
    flags = (*LORA, "--quantize", quantize)
    packing = ("--packing",) if "--packing" in OPTIONS[option] else ()
    done = train(base, tmp_path / "run", "lora_finetune", *flags, *OPTIONS[option])
    check_same(tmp_path / "run", plain("lora_finetune", *flags, *packing), 1e-5)
    assert ("blocks: fused" in done.stderr) == ("--no-fused" not in OPTIONS[option])
    assert "first step done after" in done.stderr
    flags = (*flags, *OPTIONS[option])
    chosen = [flags[flags.index(f"--{n}") + 1] for n in ("quantize", "activations", "optimizer") if f"--{n}" in flags]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("device: cpu, ")]
    assert ", float32; quantize " in line and all(f" {choice}" in line for choice in chosen)


@pytest.mark.parametrize("option", ["fused, lean", "everything", "streamed fused, from disk"])
def test_resumed_with_an_option(base, tmp_path, option):
    flags = (*LORA, *OPTIONS[option], "--schedule", "constant")
    train(base, tmp_path / "whole", "lora_finetune", *flags)
    train(base, tmp_path / "run", "lora_finetune", *flags, steps=3)
    shutil.rmtree(tmp_path / "run/adapter")
    train(base, tmp_path / "run", "lora_finetune", *flags, "--resume")
    results = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "run")]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and results[0].keys() == results[1].keys()


OF_FULL_TRAINING = {
    "offload": ("--activations", "offload"),
    "moments on the host": ("--optimizer", "adamw-host"),
    "step in backward": ("--step-in-backward",),
    "both": ("--optimizer", "adamw-host", "--step-in-backward", "--activations", "offload"),
}


@pytest.mark.parametrize("recipe", ["full_finetune", "pretrain"])
@pytest.mark.parametrize("option", OF_FULL_TRAINING)
def test_full(base, plain, tmp_path, option, recipe):
    for model in ("base", "tied"):
        train(base, tmp_path / model, recipe, *FULL, *OF_FULL_TRAINING[option], model=model)
        check_same(tmp_path / model, plain(recipe, *FULL, model=model), 1e-5)


def test_8_bit_moments_train_nearly_the_same(base, plain, tmp_path):
    train(base, tmp_path / "run", "full_finetune", *FULL, "--optimizer", "adamw-8bit")
    assert losses(tmp_path / "run") == pytest.approx(losses(plain("full_finetune", *FULL)), rel=0.02)


def test_norms_can_be_trained_under_streamed_weights(base, plain, tmp_path):
    norms = (*FULL, "--trainable", "norm")
    train(base, tmp_path / "run", "full_finetune", *norms, "--weights", "stream")
    check_same(tmp_path / "run", plain("full_finetune", *norms), 1e-5)


def test_a_quantised_head_trains(base, plain, tmp_path):
    train(base, tmp_path / "run", "lora_finetune", *LORA, "--quantize", "nf4", "--quantize-head")
    reference = losses(plain("lora_finetune", *LORA, "--quantize", "nf4"))
    assert losses(tmp_path / "run") == pytest.approx(reference, rel=0.05)
    assert losses(tmp_path / "run") != reference


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            "lora_finetune",
            ("--weights", "stream", "--activations", "none", "--no-fused"),
            "streamed weights have left the card",
        ),
        ("lora_finetune", ("--embedding", "host", "--model", "TIED"), "shares the embedding"),
        ("lora_finetune", ("--quantize", "nf4", "--quantize-head", "--model", "TIED"), "shares the embedding"),
    ],
)
def test_what_does_not_go_together(base, tmp_path, recipe, flags, message):
    flags = [base / "tied" if flag == "TIED" else flag for flag in flags]
    done = train(base, tmp_path / "run", recipe, *flags, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
