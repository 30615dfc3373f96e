"""Every measure that saves memory or time trains as the recipe does without it: same losses, same result, resumable."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.tiny import losses, make_checkpoint, read_metrics, run_recipe, sums, write_rows

LORA = ("--rank", "4", "--lr", "3e-3")
FULL = ("--lr", "1e-3", "--max-grad-norm", "0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measures")
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
    """Runs without any measure, each made once: their output folders."""
    made = {}

    def run(recipe, *flags, model="base"):
        key = (recipe, flags, model)
        if key not in made:
            made[key] = base / f"plain-{len(made)}"
            train(base, made[key], recipe, *flags, "--activations", "none", model=model)
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


MEASURES = {
    "fast": ("--activations", "fast"),
    "offload": ("--activations", "offload"),
    "every second block": ("--activations", "lean", "--activations-every", "2"),
    "by hand, fast": ("--fused", "--activations", "fast"),
    "by hand, lean": ("--fused", "--activations", "lean"),
    "by hand, offload, packed": ("--fused", "--activations", "offload", "--packing"),
    "by hand, offload with attention": ("--fused", "--activations", "offload", "--activations-host-gib", "0.0001"),
    "by hand, within a budget": ("--fused", "--activations", "lean", "--activations-gib", "0.0001"),
    "streamed": ("--weights", "stream"),
    "streamed by hand, from disk": ("--weights", "disk", "--fused", "--activations", "offload"),
    "embedding on the host": ("--embedding", "host"),
    "moments on the host": ("--optimizer", "adamw-host"),
    "everything": ("--weights", "stream", "--fused", "--activations", "offload", "--optimizer", "adamw-host"),
}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("measure", MEASURES)
def test_lora(base, plain, tmp_path, measure, quantize):
    flags = (*LORA, "--quantize", quantize)
    packing = ("--packing",) if "--packing" in MEASURES[measure] else ()
    done = train(base, tmp_path / "run", "lora_finetune", *flags, *MEASURES[measure])
    check_same(tmp_path / "run", plain("lora_finetune", *flags, *packing), 1e-5)
    assert ("forward and backward by hand" in done.stderr) == ("--fused" in MEASURES[measure])
    assert "first step done after" in done.stderr
    flags = (*flags, *MEASURES[measure])
    chosen = [flags[flags.index(f"--{n}") + 1] for n in ("quantize", "activations", "optimizer") if f"--{n}" in flags]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("device: cpu, ")]
    assert ", float32; quantize " in line and all(f" {choice}" in line for choice in chosen)


@pytest.mark.parametrize("measure", ["by hand, lean", "everything", "streamed by hand, from disk"])
def test_resumed_with_a_measure(base, tmp_path, measure):
    flags = (*LORA, *MEASURES[measure])
    train(base, tmp_path / "whole", "lora_finetune", *flags)
    train(base, tmp_path / "run", "lora_finetune", *flags, steps=3)
    shutil.rmtree(tmp_path / "run/adapter")
    train(base, tmp_path / "run", "lora_finetune", *flags, "--resume")
    results = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "run")]
    assert losses(tmp_path / "run")[3:] and results[0].keys() == results[1].keys()
    # The schedule of a run of 3 steps is another one than that of 6: only with a constant rate are they comparable.
    assert losses(tmp_path / "run")[0] == losses(tmp_path / "whole")[0]


FULL_MEASURES = {
    "offload": ("--activations", "offload"),
    "moments on the host": ("--optimizer", "adamw-host"),
    "step in backward": ("--step-in-backward",),
    "both": ("--optimizer", "adamw-host", "--step-in-backward", "--activations", "offload"),
}


@pytest.mark.parametrize("recipe", ["full_finetune", "pretrain"])
@pytest.mark.parametrize("measure", FULL_MEASURES)
def test_full(base, plain, tmp_path, measure, recipe):
    for model in ("base", "tied"):
        train(base, tmp_path / model, recipe, *FULL, *FULL_MEASURES[measure], model=model)
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
        ("lora_finetune", ("--weights", "stream", "--activations", "none"), "streamed weights have left the card"),
        ("lora_finetune", ("--quantize-head",), "--quantize nf4"),
        ("lora_finetune", ("--embedding", "host", "--model", "TIED"), "shares the embedding"),
        ("lora_finetune", ("--quantize", "nf4", "--quantize-head", "--model", "TIED"), "shares the embedding"),
        ("lora_finetune", ("--activations-every", "0"), "--activations-every 0"),
        ("full_finetune", ("--weights", "stream"), "streamed weights are frozen"),
        ("full_finetune", ("--step-in-backward",), "--max-grad-norm 0"),
        ("full_finetune", ("--step-in-backward", "--max-grad-norm", "0", "--grad-accum", "2"), "--grad-accum 1"),
    ],
)
def test_what_does_not_go_together(base, tmp_path, recipe, flags, message):
    flags = [base / "tied" if flag == "TIED" else flag for flag in flags]
    done = train(base, tmp_path / "run", recipe, *flags, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
