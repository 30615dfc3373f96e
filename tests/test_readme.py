"""Every command of the README: those that need no download are run as printed, the others must at least parse."""

import importlib
import json
import re
import shlex

import pytest
import tyro

from recipes import quickstart
from tests.tiny import ROOT, run_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines() if line
]
RECIPES = [line for line in COMMANDS if line.startswith("python recipes/")]
ON_THE_QUICKSTART = [line for line in RECIPES if "quickstart_base" in line]


def test_set_up_is_the_two_commands():
    # The first is run by tests/recipes/test_quickstart.py, the second is running now.
    assert COMMANDS[:2] == [
        "pip install -e . && python recipes/quickstart.py",
        'pip install -e ".[test]" && pytest',
    ]
    assert COMMANDS[2:] == RECIPES


def test_commands_on_the_quickstart_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = quickstart.make_rows(640 + 20, seed=0)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    quickstart.write_rows(tmp_path / "runs/quickstart/train.jsonl", rows[20:])
    quickstart.write_rows(tmp_path / "runs/quickstart/held_out.jsonl", rows[:20])
    outputs = {}
    for command in ON_THE_QUICKSTART:
        _, script, *arguments = shlex.split(command)
        arguments = [str(ROOT / a) if a.startswith("recipes/") else a for a in arguments]
        name = script.removeprefix("recipes/").removesuffix(".py")
        outputs[name] = run_recipe(name, *arguments, *(("--device", "cpu") if name != "merge" else ())).stdout
    assert list(outputs) == ["lora_finetune", "evaluate", "generate", "merge"]
    assert json.loads(outputs["evaluate"])["loss"] < 1.5
    assert outputs["generate"].strip().startswith("{")
    assert (tmp_path / "runs/merged/model.safetensors").exists()


@pytest.mark.parametrize("command", [line for line in RECIPES if line not in ON_THE_QUICKSTART])
def test_other_commands_parse(command):
    _, script, *arguments = shlex.split(command)
    recipe = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    tyro.cli(recipe.Config, args=arguments)


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md", "recipes/benchmarks/README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_numbers_are_those_of_the_raw_file():
    raw = json.loads((ROOT / "recipes/benchmarks/benchmark_h200.json").read_text())
    for row in raw["speed"]:
        figures = f"{row['tokens_per_second']:,.0f} / {row['peak_gib']:.1f} ({row['percent_of_ceiling']:.0f} %)"
        if row["settings"]["fused"] or row["settings"]["activations"] == "none":
            assert figures in README, row["settings"]
    confirmed = [row for row in raw["longest"] if row["settings"]["cap_gib"]]
    assert all(row["within_cap"] and f"{row['settings']['length']:,} tokens" in README for row in confirmed)
    fit = raw["longest_fit"]
    assert f"{fit['fixed_gib']:.1f} GiB and {fit['kb_per_token']:.0f} KB per token" in README
    assert all(f"{row['peak_gib']:.1f} GiB" in README for row in raw["full"])
