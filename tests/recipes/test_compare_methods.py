"""The comparison of methods: by the recipe, on the quickstart's task and on other data, and what it says of them."""

import json
import random

import pytest
import torch

from models.llama import PRESETS
from modules.adapters.methods import METHODS
from recipes import compare_methods
from recipes.benchmarks.compare_report import LETTER, LINE, draw, place_labels, table
from tests.tiny import ROOT, losses, run_recipe, sums, test_data, write_rows

BENCHMARKS = ROOT / "recipes/benchmarks"


def test_the_quickstart_s_task(tmp_path):
    flags = ("--output", tmp_path, "--train-rows", 32, "--held-out-rows", 4, "--max-steps", 5, "--device", "cpu")
    flags += ("--methods", "ln", "prefix", "lora", "--rank", 4)
    done = run_recipe("compare_methods", *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["ln", "prefix", "lora"]
    by_name = {row["method"]: row for row in results["rows"]}
    assert by_name["ln"]["trained"] == 9 * 128 and by_name["prefix"]["trained"] == 2 * 20 * 4 * 64
    for name, row in by_name.items():
        assert row["settings"]["lr"] == compare_methods.SETTINGS[name]["lr"]
        assert row["last_loss"] < row["first_loss"] and 0 <= row["exact_match"] <= 1
        assert [round(losses(tmp_path / name)[i], 4) for i in (0, -1)] == [row["first_loss"], row["last_loss"]]
        assert f"| {name} | " in done.stdout
    assert results["command"].endswith("--train-rows 32 --held-out-rows 4 --max-steps 5 --rank 4 --device cpu")
    assert (tmp_path / "results.svg").read_text().startswith("<svg")
    first = (tmp_path / "train.jsonl").read_text()
    run_recipe("compare_methods", *flags[:-1], 2)  # the earlier comparison is replaced
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (tmp_path / "train.jsonl").read_text() == first and again[0]["eval_loss"] == by_name["ln"]["eval_loss"]
    assert again[2]["trained"] * 2 == by_name["lora"]["trained"]


def test_other_data_and_a_base_of_random_weights(tmp_path, monkeypatch):
    """One after another in this process, as on a GPU; a method that cannot run does not stop the others."""
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setitem(PRESETS, "tiny", {"vocab_size": 128256, "max_position_embeddings": 256, **shape})
    monkeypatch.setattr(compare_methods, "in_processes", compare_methods.in_turn)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in sums(40)]
    done = run_recipe(
        "compare_methods",
        *("--output", tmp_path / "out", "--preset", "tiny", "--tokenizer", test_data() / "tokenizers/llama3"),
        *("--data", write_rows(tmp_path / "a.jsonl", rows), "--eval-data", write_rows(tmp_path / "b.jsonl", rows)),
        *("--prompt-field", "question", "--completion-field", "answer", "--methods", "lora", "prompt", "bitfit"),
        *("--train-rows", 30, "--held-out-rows", 5, "--max-steps", 3, "--batch-size", 4, "--num-virtual-tokens", 0),
        *("--lr-scale", 0.5, "--device", "cpu"),
    )
    lora, prompt, bitfit = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert "exact_match" not in lora and lora["eval_loss"] > 0 and bitfit["eval_loss"] > 0
    assert lora["settings"]["lr"] == compare_methods.SETTINGS["lora"]["lr"] / 2
    assert (
        prompt["failed"] == "ValueError: --num-virtual-tokens 0 must be at least 1" and prompt["failed"] in done.stdout
    )
    assert len((tmp_path / "out/train.jsonl").read_text().splitlines()) == 30
    assert len((tmp_path / "out/held_out.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "lora", "lorra"), "--methods lorra: not among lora"),
        (("--data", "x.jsonl"), "go together; without them: the quickstart's task"),
        (("--model", "m", "--preset", "p", "--data", "x", "--eval-data", "x"), "give one of them"),
        (("--preset", "p", "--data", "x", "--eval-data", "x"), "--preset and --tokenizer"),
    ],
)
def test_mistakes_are_explained(tmp_path, flags, message):
    done = run_recipe("compare_methods", "--output", tmp_path, "--device", "cpu", *flags, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_names_cover_no_dot_and_no_other_name():
    rng = random.Random(0)
    for spread in (400, 150):
        dots = [(100 + rng.random() * spread, 100 + rng.random() * spread) for _ in range(19)]
        boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
        for name, (x, y, anchor) in zip(METHODS, place_labels(list(METHODS)[:19], dots, (70, 540)), strict=False):
            left = x if anchor == "start" else x - len(name) * LETTER
            boxes.append((left, y - 4 - LINE / 2, left + len(name) * LETTER, y - 4 + LINE / 2))
        for i, a in enumerate(boxes):
            for b in boxes[max(i + 1, 19) :]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("name", ["compare_methods_quickstart", "compare_methods_gsm8k_h100"])
def test_the_page_shows_the_committed_figures(tmp_path, name):
    results, page = json.loads((BENCHMARKS / f"{name}.json").read_text()), (BENCHMARKS / "README.md").read_text()
    assert table(results) in page and f"(../assets/{name}.svg)" in page
    draw(results, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text() == (ROOT / f"recipes/assets/{name}.svg").read_text()


def test_the_committed_comparison_is_whole():
    results = json.loads((BENCHMARKS / "compare_methods_quickstart.json").read_text())
    assert {row["method"] for row in results["rows"]} <= set(METHODS) and compare_methods.SETTINGS.keys() <= set(
        METHODS
    )
    assert not any("failed" in row for row in results["rows"])
    seconds = sum(row["processor_seconds"] + row["examination_processor_seconds"] for row in results["rows"])
    assert seconds / 2 < 600  # on two cores
