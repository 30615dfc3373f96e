"""The README's first command, the rows it makes up and the small base model that it teaches."""

import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from checkpointing.pretrained import WeightFiles, load_weights, read_config
from checkpointing.run_folder import RunFolder
from data.tokenizers.load import load_tokenizer
from models import build_model
from recipes import quickstart, quickstart_base
from tests.tiny import ROOT, losses

MEGABYTE = 10**6


def test_rows_are_those_of_the_seed_and_no_two_alike():
    rows = quickstart.make_rows(1400, seed=0)
    assert rows == quickstart.make_rows(1400, seed=0)
    assert rows != quickstart.make_rows(1400, seed=1)
    assert len({row["prompt"] for row in rows}) == 1400  # so no held-out row is in the training data


def test_a_completion_says_what_the_sentence_says():
    for row in quickstart.make_rows(300, seed=1):
        prompt, completion = row["prompt"], row["completion"]
        order = json.loads(completion)
        assert completion == " " + json.dumps(order)
        assert list(order) == ["name", "city", "item", "color", "count", "day"]
        words = set(re.findall(r"\w+", prompt))
        words |= {word.lower() for word in words}  # a color may begin the sentence
        number = quickstart.NUMBERS[order["count"] - 2]
        assert {order["name"], order["city"], order["color"], order["item"] + "s", number} <= words
        assert [day[:3] for day in quickstart.DAYS if day in words] == [order["day"]]
    assert quickstart.NUMBERS[12 - 2] == "twelve"


def test_the_base_has_not_read_the_json():
    rng = random.Random(0)
    texts = [quickstart_base.document(rng) for _ in range(3000)]
    keys = re.compile('"(name|city|item|color|count|day)":')
    assert keys.search(quickstart.make_rows(1, seed=0)[0]["completion"])
    assert not [text for text in texts if keys.search(text)]


def test_the_committed_base_is_small_and_opens_in_transformers():
    files = {path.name: path.stat().st_size for path in quickstart.BASE.iterdir()}
    names = ("config", "generation_config", "tokenizer", "tokenizer_config")
    assert set(files) == {"model.safetensors", *(f"{name}.json" for name in names)}
    assert sum(files.values()) <= 4 * MEGABYTE
    ours = build_model(read_config(quickstart.BASE))
    load_weights(ours, WeightFiles(quickstart.BASE), device=torch.device("cpu"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(quickstart.BASE, dtype=torch.float32)
    tokenizer = load_tokenizer(quickstart.BASE)
    ids = torch.tensor([tokenizer.encode_prompt(quickstart.make_rows(1, seed=0)[0]["prompt"])])
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)


def test_the_committed_tokenizer_is_read_as_tokenizers_reads_it():
    oracle = tokenizers.Tokenizer.from_file(str(quickstart.BASE / "tokenizer.json"))
    tokenizer = load_tokenizer(quickstart.BASE)
    rng = random.Random(1)
    texts = [text for row in quickstart.make_rows(300, seed=2) for text in row.values()]
    texts += [quickstart_base.document(rng) for _ in range(300)]
    for text in [*texts, "Zoë würde 12¾ Lampen 🛋 kaufen\n\n\t "]:
        assert tokenizer.encode_prompt(text) == oracle.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # one token a word keeps copying easy: this is what the vocabulary was trained for
    lengths = [len(tokenizer.encode(row["completion"])) for row in quickstart.make_rows(300, seed=2)]
    assert max(lengths) <= 40


def test_an_earlier_quickstart_is_replaced(tmp_path, capsys):
    settings = dict(output=tmp_path, train_rows=32, held_out_rows=4, epochs=1)
    quickstart.main(quickstart.Config(**settings))
    first = losses(tmp_path / "lora")
    quickstart.main(quickstart.Config(**settings))
    assert losses(tmp_path / "lora") == first and len(first) == 2
    assert losses(tmp_path / "qlora")[0] == pytest.approx(first[0], rel=0.1)
    assert losses(tmp_path / "qlora") != first
    held_out, train, answers = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("held_out.jsonl", "train.jsonl", "answers.jsonl")
    )
    assert (len(held_out), len(train)) == (4, 32)
    assert [{key: row[key] for key in ("prompt", "completion")} for row in answers] == held_out
    assert capsys.readouterr().out.count("LoRA") >= 2
    assert (tmp_path / "lora" / "loss.svg").exists() and (tmp_path / "qlora" / "loss.svg").exists()


def test_ctrl_c_in_a_training_ends_it_all(tmp_path, monkeypatch):
    def interrupted(run, total_steps, start_loop=RunFolder.start_loop):
        start_loop(run, total_steps)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunFolder, "start_loop", interrupted)
    with pytest.raises(SystemExit) as stop:
        quickstart.main(quickstart.Config(output=tmp_path, train_rows=8, held_out_rows=2, epochs=1))
    assert stop.value.code == 130 and (tmp_path / "lora/checkpoints/step-0").is_dir()
    assert not (tmp_path / "qlora").exists()


def test_the_base_is_remade_by_its_command(tmp_path):
    """With a thousandth of the texts; the vocabulary is then smaller, the files are the same."""
    settings = dict(documents=400, batch_size=4, device="cpu", seed=3)
    quickstart_base.main(quickstart_base.Config(work=tmp_path / "work", output=tmp_path / "base", **settings))
    assert {path.name for path in (tmp_path / "base").iterdir()} == {path.name for path in quickstart.BASE.iterdir()}
    found = losses(tmp_path / "work" / "run")
    assert found[-1] < found[0] - 0.5
    model = build_model(read_config(tmp_path / "base"))
    load_weights(model, WeightFiles(tmp_path / "base"), device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.slow(45)
def test_the_readme_command_teaches_the_base_its_job(tmp_path):
    """All of it, as printed; limits are those that the README promises."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = [sys.executable, str(ROOT / "recipes" / "quickstart.py")]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # One thread: processor time is what the command takes on a machine that does nothing else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180

    table = re.findall(r"^(base model|LoRA|QLoRA \(NF4\)) +([\d.]+)%", done.stdout, re.M)
    base, lora, qlora = (float(share) for _, share in table)
    assert base <= 5 and lora >= 90 and qlora >= lora - 3, done.stdout
    assert (tmp_path / "runs/quickstart/lora/loss.svg").read_text().startswith("<svg")

    command = shlex.split(done.stdout[done.stdout.index("python ") :].partition("\n\n")[0].replace("\\\n", " "))
    environment = os.environ | {"PYTHONPATH": ""}
    said = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in (tmp_path / "runs/quickstart/answers.jsonl").read_text().splitlines()]
    assert said.stdout.strip() == rows[0]["LoRA"].strip(), said.stderr
