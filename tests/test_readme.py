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
BENCHMARKS = (ROOT / "recipes/benchmarks/README.md").read_text(encoding="utf-8")
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


@pytest.mark.slow(9)
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


@pytest.mark.parametrize(
    "page", ["README.md", "ARCHITECTURE.md", "recipes/README.md", "recipes/benchmarks/README.md", "CONTRIBUTING.md"]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_numbers_are_those_of_the_raw_files():
    folder = ROOT / "recipes/benchmarks"
    h100, h200 = (json.loads((folder / f"benchmark_{card}.json").read_text()) for card in ("h100", "h200"))
    shown = h200["speed"] + h200["peers"]
    assert len(shown) == 18
    for row in shown:
        assert f"| {row['tokens_per_second']:,.0f} / {row['peak_gib']:.1f} |" in README, row["settings"]
    fast = [row for row in h200["speed"] if row["settings"]["activations"] == "fast"]
    *large, small = [row["percent_of_ceiling"] for row in fast]
    assert fast[-1]["settings"]["preset"] == "llama-3.2-1b"
    ceiling = f"({h200['ceilings']['matmul_tflops']:.0f} TFLOP/s)"
    assert (
        f"{min(large):.0f} to {max(large):.0f} %" in BENCHMARKS
        and f"{small:.0f} %" in BENCHMARKS
        and ceiling in BENCHMARKS
    )
    fit = h200["longest_fit"]
    assert f"{fit['fixed_gib']:.1f} GiB and {fit['kb_per_token']:.0f} KB per token" in BENCHMARKS
    words = " ".join(BENCHMARKS.split())
    places = {(row["settings"]["length"], row["settings"]["weights"]): row for row in h100["small"]}
    for length in (2048, 4096, 16384):
        row = places[length, "stream"]
        assert row["within_cap"] and f"{row['card_gib']:.1f} GiB, {row['tokens_per_second']:,.0f} tokens/s" in words
    for length, share in ((4096, "98 %"), (16384, "99.6 %")):
        ratio = places[length, "stream"]["tokens_per_second"] / places[length, "resident"]["tokens_per_second"]
        assert abs(100 * ratio - float(share[:-1])) < 0.5 and f"{share}" in words
    assert f"({places[4096, 'resident']['card_gib']:.0f} GiB)" in words
    lora, _, qlora, loading, _ = h100["vlm"]
    assert f"LoRA {lora['tokens_per_second']:,.0f} tokens/s at {lora['peak_gib']:.1f} GiB" in words
    assert f"QLoRA {qlora['tokens_per_second']:,.0f} at {qlora['peak_gib']:.1f} ({qlora['card_gib']:.1f} on" in words
    assert f"{100 * loading['idle_share']:.1f} % of its time" in words
    confirmed = [row for row in h200["longest"] if row["settings"]["cap_gib"]]
    assert all(
        row["within_cap"] and f"{row['settings']['length']:,} tokens" in README + BENCHMARKS for row in confirmed
    )
    assert f"took {confirmed[-1]['card_gib']:.2f}, and {confirmed[-1]['host_gib']:.0f} GiB of host memory" in words
    assert all(f"{row['peak_gib']:.1f} GiB" in BENCHMARKS for row in h200["full"])
    for row in h100["full"]:
        if row["settings"]["batch"] == 4:
            sizes, speed = (f"{row[size]:.1f}" for size in ("peak_gib", "card_gib")), f"{row['tokens_per_second']:,.0f}"
            assert re.search(r"\b{}( GiB allocated)? \({}( on the card)?\) and {}".format(*sizes, speed), words)


def test_the_benchmarks_page_shows_the_raw_files():
    folder = ROOT / "recipes/benchmarks"
    h100, h200 = (json.loads((folder / f"benchmark_{card}.json").read_text()) for card in ("h100", "h200"))
    for row in [row for row in h100["speed"] if row["settings"]["activations_gib"] != 2] + h100["peers"]:
        figures = f"{row['tokens_per_second']:,.0f} / {row['peak_gib']:.1f} ({row['percent_of_ceiling']:.0f} %)"
        assert figures in BENCHMARKS, row["settings"]
    for raw, fused in ((h100, True), (h200, False)):
        rungs = [row["max_relative_deviation"] for row in raw["rungs"] if row["settings"]["fused"] == fused]
        assert f"within {100 * max(rungs):.2f} %" in " ".join(BENCHMARKS.split())
