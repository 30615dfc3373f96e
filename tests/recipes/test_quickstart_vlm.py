"""The README's second quickstart: its world, its start, and that it learns to see within what the README promises."""

import json
import os
import random
import re
import resource
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageColor
from transformers import LlavaForConditionalGeneration

from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.tokenizers.load import load_tokenizer
from models import build_model
from modules.attention import padded_layout
from modules.image_tokens import place_images
from recipes import quickstart_vlm, quickstart_world
from tests.tiny import ROOT, losses


def scenes(count, groups=2, held_out=False, seed=0):
    rng = random.Random(seed)
    return [quickstart_world.make_scene(rng, groups, held_out) for _ in range(count)]


def test_no_combination_is_in_training_and_in_the_exam():
    train, held_out = (set(quickstart_world.kinds(held_out)) for held_out in (False, True))
    assert (len(train), len(held_out)) == (360, 120) and not train & held_out
    # Of each three words every combination is in training: what is new is all four together.
    for left_out in range(4):
        threes = {kind[:left_out] + kind[left_out + 1 :] for kind in train}
        assert {kind[:left_out] + kind[left_out + 1 :] for kind in held_out} <= threes
    for groups in (1, 2):
        for wanted, found in ((train, scenes(100, groups)), (held_out, scenes(100, groups, held_out=True))):
            assert {(g.number, g.color, g.shape, g.place) for scene in found for g in scene} <= wanted


def test_answers_are_what_is_drawn():
    for groups in (1, 2):
        for scene in scenes(40, groups):
            picture = quickstart_world.draw(scene, 96)
            paper = ImageColor.getrgb(quickstart_world.PAPER)
            left = picture.copy()
            for group in scene:
                assert len(group.spots) == quickstart_world.NUMBERS.index(group.number) + 1
                for x, y, r in group.spots:
                    vertical, horizontal = ("bottom" if y > 0.5 else "top"), ("right" if x > 0.5 else "left")
                    assert group.place == f"{vertical} {horizontal}"
                    inside = (x + 0.8 * r if group.shape == "ring" else x, y)
                    found = picture.getpixel(tuple(round(96 * share) for share in inside))
                    assert found == ImageColor.getrgb(quickstart_world.COLORS[group.color])
                    box = [round(96 * (at + sign * 1.35 * r)) for sign in (-1, 1) for at in (x, y)]
                    left.paste(paper, box)
            assert left.getcolors() == [(96 * 96, paper)]  # and nothing else
            described, *asked = dict(quickstart_world.questions(scene)).items()
            assert described[1] == ", ".join(f"{group.words} {group.place}" for group in scene)
            assert len(asked) == (4 if groups == 1 else 0)
            if groups == 1:
                assert {answer for _, answer in asked} == {*vars(scene[0]).values()} - {scene[0].spots}


def test_the_start_opens_in_transformers(tmp_path):
    quickstart_vlm.write_start(tmp_path / "start", scenes(300), seed=0)
    ours = build_model(read_config(tmp_path / "start"))
    load_weights(ours, WeightFiles(tmp_path / "start"), device=torch.device("cpu"), dtype=torch.float32)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "start", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(tmp_path / "start")
    image = tokenizer.special_tokens["<image>"]
    ids = torch.tensor([[*[image] * ours.config.tokens_per_image, *tokenizer.encode(" What do you see? A:")]])
    pixels = torch.randn(1, 3, quickstart_vlm.SIDE, quickstart_vlm.SIDE)
    sizes = dict(image_token=image, tokens_per_image=ours.config.tokens_per_image)
    with torch.no_grad():
        found = ours.logits(ours(ids, padded_layout(ids.shape[1]), images=place_images(ids, pixels, **sizes)))
        torch.testing.assert_close(found, theirs(input_ids=ids, pixel_values=pixels).logits, atol=1e-4, rtol=0)
    # A word is one token, so that an answer takes few steps.
    assert len(tokenizer.encode(" three orange triangles bottom right")) == 5


def test_an_earlier_quickstart_is_replaced(tmp_path, capsys):
    settings = dict(output=tmp_path, train_pictures=40, held_out_pictures=8, epochs=1)
    quickstart_vlm.main(quickstart_vlm.Config(**settings))
    first = losses(tmp_path / "open"), (tmp_path / "answers.jsonl").read_bytes()
    quickstart_vlm.main(quickstart_vlm.Config(**settings))
    assert (losses(tmp_path / "open"), (tmp_path / "answers.jsonl").read_bytes()) == first
    rows = [json.loads(line) for line in first[1].splitlines()]
    assert len(rows) == 4 * 5 + 4 and capsys.readouterr().out.count("24 questions about 8 pictures") == 2


@pytest.mark.slow(120)
def test_the_readme_command_teaches_it_to_see(tmp_path):
    """All of it, as printed; limits are what is promised of it."""
    script = [sys.executable, str(ROOT / "recipes" / "quickstart_vlm.py")]

    def run(*flags):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*script, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # One thread: processor time is what it takes on a machine that does nothing else. Four minutes are promised, on one
    # that does a small part of it in seven seconds; the others are slow.
    _, part = run("--output", "small", "--train-pictures", "200", "--epochs", "1")
    done, seconds = run()
    assert seconds < 240 * max(1, part / 7)

    table = re.findall(r"^(eyes shut|eyes open) +([\d.]+)%", done.stdout, re.M)
    shut, opened = (float(share) for _, share in table)
    assert shut <= 30 and opened >= 90, done.stdout
    with Image.open(tmp_path / "runs/quickstart_vlm/answers.png") as picture:
        assert picture.size == Image.open(ROOT / "recipes/assets/quickstart_vlm.png").size

    command = shlex.split(done.stdout[done.stdout.index("python ") :].partition("\n\n")[0].replace("\\\n", " "))
    environment = os.environ | {"PYTHONPATH": ""}
    said = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in (tmp_path / "runs/quickstart_vlm/answers.jsonl").read_text().splitlines()]
    assert said.stdout.strip() == rows[0]["eyes open"], said.stderr
