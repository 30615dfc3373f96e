"""A few deterministic steps of every training recipe against the numbers in golden.json.

A change that is meant to change no arithmetic leaves them as they are. To renew them, delete golden.json, run this test
and say in the commit why they moved.
"""

import json
from pathlib import Path

import pytest

from tests.tiny import losses, make_checkpoint, run_recipe, sums, write_rows

GOLDEN = Path(__file__).with_name("golden.json")
RUNS = {
    "lora": ("lora_finetune", "--rank", "4", "--lr", "3e-3"),
    "qlora, packed": ("lora_finetune", "--rank", "4", "--lr", "3e-3", "--quantize", "nf4", "--packing"),
    "full": ("full_finetune", "--lr", "1e-3", "--schedule", "linear", "--warmup-steps", "2"),
    "full in bfloat16": ("full_finetune", "--lr", "1e-3", "--dtype", "bfloat16"),
    "pretrain": ("pretrain", "--lr", "1e-3", "--weight-decay", "0.1"),
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_golden(tmp_path, name):
    make_checkpoint(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", sums(20))
    recipe, *flags = RUNS[name]
    run_recipe(
        recipe,
        *("--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run"),
        *("--device", "cpu", "--seq-len", "64", "--batch-size", "2", "--max-steps", "5", "--epochs", "5", *flags),
    )
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if name not in golden:
        GOLDEN.write_text(json.dumps(golden | {name: losses(tmp_path / "run")}, indent=1) + "\n")
        pytest.fail(f"golden.json had no numbers for {name!r}; they are written now")
    assert losses(tmp_path / "run") == pytest.approx(golden[name], rel=2e-2 if "bfloat16" in name else 1e-4)
