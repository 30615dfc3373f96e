"""Recipes repeat their loop on purpose; this holds the copies together."""

import dataclasses
import importlib
import re
import tomllib

import pytest
import tyro

from tests.tiny import ROOT

TRAINING = ("lora_finetune", "full_finetune", "pretrain")
BANNERS = [
    "1 Config",
    "2 Setup",
    "3 Tokenizer and data",
    "4 Model and weights",
    "5 Adapters / quantisation",
    "6 Memory plan and compile",
    "7 Optimizer and schedule",
    "8 Resume",
    "9 Training loop",
    "10 Save",
]
# Lines that say what a recipe is: the only differences allowed under these banners.
OWN_WORDS = ("split_long=True,",)
IDENTICAL = ("2 Setup", "3 Tokenizer and data", "7 Optimizer and schedule", "9 Training loop")
# What stands in the recipes that train other things instead of these lines of lora_finetune.py.
SHARED = ("2 Setup", "7 Optimizer and schedule", "9 Training loop")
BUILD = "optimizer = build_optimizer(cfg.optimizer, trainable, lr=cfg.lr, weight_decay=cfg.weight_decay)"
BUILD_GROUPS = BUILD.removesuffix(")") + ", groups=groups)"
PREPARE = ['if hasattr(method, "prepare_optimizer"):', "method.prepare_optimizer(model, optimizer)"]
RATE, BACKWARD = 'group["lr"] = lr', "scaler.scale(loss).backward()"
IMAGES = {
    "hidden = model(batch.input_ids, batch.layout)": [
        "hidden = model(batch.input_ids, batch.layout, images=batch.images)"
    ],
    BACKWARD: [
        "if loss.requires_grad:  # where only what sees is trained, rows without an image teach nothing",
        BACKWARD,
    ],
}
VARIANTS = {
    "peft_finetune": {BUILD: [BUILD_GROUPS, *PREPARE], RATE: [f'{RATE} * group.get("lr_ratio", 1.0)']},
    "vlm_finetune": {BUILD: [BUILD_GROUPS], RATE: [f'{RATE} * group["lr_ratio"]'], **IMAGES},
    "vlm_pretrain_projector": IMAGES,
}
# What every training recipe takes, with the defaults that outsiders rely on (no default: the recipe's choice).
CONTRACT = dict(
    model=None,
    data=None,
    output=None,
    eval_data=None,
    epochs=1,
    max_steps=None,
    batch_size=None,
    grad_accum=None,
    seq_len=None,
    packing=None,
    shuffle=True,
    lr=None,
    schedule=None,
    warmup_steps=None,
    weight_decay=0.0,
    max_grad_norm=1.0,
    seed=0,
    device=None,
    dtype=None,
    compile=None,
    save_every=None,
    eval_every=None,
    resume=False,
)
CODE = ("recipes", "models", "modules", "checkpointing", "data")
LORA = CONTRACT | dict(rank=None, alpha=None, dropout=0.0, targets=None, quantize="none")


def sections(name: str) -> dict[str, str]:
    source = (ROOT / "recipes" / f"{name}.py").read_text()
    parts = re.split(r"^ *# -{50,}\n *# (\d+ [^\n:]+)[^\n]*\n", source, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", [*TRAINING, *VARIANTS])
def test_banners_and_size(name):
    assert list(sections(name)) == BANNERS
    longest = 440 if name in VARIANTS else 400
    assert len((ROOT / "recipes" / f"{name}.py").read_text().splitlines()) <= longest


@pytest.mark.parametrize("name", TRAINING[1:])
@pytest.mark.parametrize("banner", IDENTICAL)
def test_what_must_not_drift_is_identical(name, banner):
    def text(recipe):
        lines = sections(recipe)[banner].splitlines()
        return "\n".join(line for line in lines if line.strip() not in OWN_WORDS)

    assert text(name) == text(TRAINING[0])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("banner", SHARED)
def test_a_variant_differs_where_it_must(name, banner):
    mine, theirs = (map(str.strip, sections(recipe)[banner].splitlines()) for recipe in (name, TRAINING[0]))
    assert list(mine) == [new for line in theirs for new in VARIANTS[name].get(line, [line])]


@pytest.mark.parametrize("name", [*TRAINING, *VARIANTS])
def test_flags_of_the_contract(name):
    config = importlib.import_module(f"recipes.{name}").Config
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    for flag, default in (LORA if hasattr(config, "rank") else CONTRACT).items():
        assert flag in fields
        if default is not None:
            assert fields[flag] == default
    source = (ROOT / "recipes" / f"{name}.py").read_text()
    for field in fields:  # a docstring under every field
        assert re.search(rf'^    {field}: [^\n]+\n    """', source, flags=re.MULTILINE), field


@pytest.mark.parametrize("name", [*TRAINING, *VARIANTS])
def test_how_a_run_begins_and_stops(name):
    """Flags of a command line all count; a run that was stopped does not look complete."""
    source = (ROOT / "recipes" / f"{name}.py").read_text()
    assert 'go on with --resume")\n        raise SystemExit(run.stop_status)\n' in source
    assert source.endswith("    with clear_errors():\n        main(tyro.cli(Config))\n")


@pytest.mark.parametrize("name", [*TRAINING, *VARIANTS])
def test_switches_come_in_pairs(name):
    recipe = importlib.import_module(f"recipes.{name}")
    required = ["--model", "m", "--data", "d", "--output", "o"]
    for switch in ("packing", "shuffle", "compile"):
        for flag, value in ((switch, True), (f"no-{switch}", False)):
            assert getattr(tyro.cli(recipe.Config, args=[*required, f"--{flag}"]), switch) is value


def test_torchao_is_imported_in_one_place():
    importing = [
        path.relative_to(ROOT).as_posix()
        for folder in CODE
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) torchao", path.read_text(), flags=re.MULTILINE)
    ]
    assert importing == ["modules/quantization/torchao_parts.py"]


def test_nothing_needs_numpy():
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 80
    assert not [path.name for path in files if re.search(r"import numpy|from numpy|\.numpy\(", path.read_text())]


def test_every_folder_with_code_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    assert set(settings["packages"]) == {".".join(folder.parts) for folder in folders}
