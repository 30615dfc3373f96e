"""Recipes repeat their loop on purpose; this holds the copies together."""

import dataclasses
import difflib
import importlib
import re
from itertools import combinations

import pytest

from recipes.common import flags
from recipes.common.checks import check_flags
from tests.tiny import ROOT

# What each recipe has in its loop (sections 7 and 9) instead of lora_finetune.py's lines.
BUILD = "optimizer = build_optimizer(cfg.optimizer, trainable, lr=cfg.lr, weight_decay=cfg.weight_decay)"
BUILD_GROUPS = BUILD.removesuffix(")") + ", groups=groups)"
PREPARE = ['if hasattr(method, "prepare_optimizer"):', "method.prepare_optimizer(model, optimizer)"]
FORWARD, BACKWARD = "hidden = model(batch.input_ids, batch.layout)", "scaler.scale(loss).backward()"
WITHOUT_IMAGES = "if loss.requires_grad:  # where only the vision part is trained, rows without an image teach nothing"
IMAGES = {
    FORWARD: [FORWARD.removesuffix(")") + ", images=batch.images)"],
    BACKWARD: [WITHOUT_IMAGES, BACKWARD],
}
OWN = {
    "lora_finetune": {},
    "full_finetune": {},
    "pretrain": {},
    "peft_finetune": {BUILD: [BUILD_GROUPS, *PREPARE]},
    "vlm_finetune": {BUILD: [BUILD_GROUPS], **IMAGES},
    "vlm_pretrain_projector": IMAGES,
}
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
# What every training recipe takes, with the defaults that outsiders rely on (None: the recipe's choice).
CONTRACT = dict.fromkeys(
    ("model data output batch_size grad_accum seq_len packing lr schedule warmup_steps device dtype compile").split()
    + ["save_every"]
)
CONTRACT |= dict(eval_data=None, epochs=1, max_steps=None, shuffle=True, weight_decay=0.0, max_grad_norm=1.0, seed=0)
CONTRACT |= dict(eval_every=None, resume=False)
LORA = CONTRACT | dict(rank=None, alpha=None, dropout=0.0, targets=None, quantize="none")


def source(name: str) -> str:
    return (ROOT / "recipes" / f"{name}.py").read_text()


def sections(name: str) -> dict[str, str]:
    parts = re.split(r"^ *# -{50,}\n *# (\d+ [^\n:]+)[^\n]*\n", source(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", OWN)
def test_banners_and_size(name):
    assert list(sections(name)) == BANNERS
    assert len(source(name).splitlines()) <= (230 if name == "lora_finetune" else 260)


def test_a_recipe_shows_what_is_its_own():
    for one, other in combinations(OWN, 2):
        changes = difflib.ndiff(source(one).splitlines(), source(other).splitlines())
        assert sum(line[0] in "+-" for line in changes) <= 120, (one, other)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("banner", ["2 Setup", "7 Optimizer and schedule", "9 Training loop"])
def test_what_must_not_drift_is_identical(name, banner):
    mine, theirs = (map(str.strip, sections(recipe)[banner].splitlines()) for recipe in (name, "lora_finetune"))
    assert list(mine) == [new for line in theirs for new in OWN[name].get(line, [line])]


@pytest.mark.parametrize("name", OWN)
def test_flags_of_the_contract(name):
    config = importlib.import_module(f"recipes.{name}").Config
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    for flag, default in (LORA if hasattr(config, "rank") else CONTRACT).items():
        assert flag in fields
        if default is not None:
            assert fields[flag] == default
    documented = {field for topic in config.__mro__[:-1] for field in flags.docstrings(topic)}
    assert documented == set(fields)


@pytest.mark.parametrize("name", OWN)
def test_how_a_run_begins_and_stops(name):
    """Flags of a command line all count; a run that was stopped does not look complete."""
    assert 'go on with --resume")\n        raise SystemExit(run.stop_status)\n' in source(name)
    assert source(name).endswith("    with clear_errors():\n        main(parse_flags(Config))\n")


@pytest.mark.parametrize("name", OWN)
def test_the_command_line(name, capsys):
    config = importlib.import_module(f"recipes.{name}").Config
    required = ["--model", "m", "--data", "d", "--output", "o"]
    assert flags.parse_flags(config, required) == config(model="m", data=flags.Path("d"), output=flags.Path("o"))
    for switch in ("packing", "shuffle", "compile"):
        for flag, value in ((switch, True), (f"no-{switch}", False)):
            assert getattr(flags.parse_flags(config, [*required, f"--{flag}"]), switch) is value
    with pytest.raises(SystemExit):
        flags.parse_flags(config, ["--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^\W*(\w+) options\W*$", text, flags=re.MULTILINE)
    assert {"model", "data", "schedule", "memory", "run"} <= set(groups) and len(groups) == len(set(groups))
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(config))


@pytest.mark.parametrize("name", OWN)
def test_checks_ask_only_for_flags_that_a_copy_has(name, tmp_path):
    config = importlib.import_module(f"recipes.{name}").Config
    (tmp_path / "data.jsonl").touch()
    every = {field.name: field.default for field in dataclasses.fields(config)}
    every |= dict(model="m", data=tmp_path / "data.jsonl", output=tmp_path / "run")
    topics = [topic for topic in config.__mro__[1:-1] if topic is not flags.TrainingFlags]
    for gone in [{field.name for field in dataclasses.fields(topic)} for topic in topics] + [{name} for name in every]:
        kept = {name: value for name, value in every.items() if name not in gone - {"language"}}
        check_flags(dataclasses.make_dataclass("Config", kept)(**kept))
