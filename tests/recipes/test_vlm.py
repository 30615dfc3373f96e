"""vlm_finetune.py and what takes its results: memory options, samples, kills, bad rows (parity: test_vlm_families)."""

import shutil

import peft
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as HFLlava

from data.dataset import load_dataset
from tests.data.images import tiny_vision
from tests.tiny import SHAPE, losses, read_metrics, run_recipe, write_rows

TOKENS = tiny_vision.TOKENS
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def make_llava(folder):
    """A random LLaVA with its processor, as transformers saves it."""
    shutil.copytree(tiny_vision.folder(), folder)
    processor = tiny_vision.llava_processor()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, image_size=tiny_vision.SIDE, patch_size=tiny_vision.PATCH)
    text = LlamaConfig(**SHAPE, vocab_size=len(processor.tokenizer))
    model = HFLlava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.08)
    model.save_pretrained(folder)
    return model


def rows(folder, count=12):
    """One image, none, and two, in both forms of row."""
    for i in range(4):
        tiny_vision.draw(30 + 7 * i, 40 - 3 * i, seed=i).save(folder / f"{i}.png")
    made = []
    for i in range(count):
        answer = f"it is number {i * 7 % 5}"
        images = [f"{(i + j) % 4}.png" for j in range((1, 0, 2)[i % 3])]
        if i % 2:
            content = [{"type": "image", "path": path} for path in images]
            content.append({"type": "text", "text": f"which one is {i}?"})
            made.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
        else:
            words = "<image>\n" * len(images) + f"which one is {i}?"
            turns = [{"from": "human", "value": words}, {"from": "gpt", "value": answer}]
            made.append({"conversations": turns} | ({"image": images} if images else {}))
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    make_llava(folder / "base")
    write_rows(folder / "rows.jsonl", rows(folder))
    return folder


def arguments(base, output, *flags):
    return [
        *("--model", base / "base", "--data", base / "rows.jsonl", "--output", output, "--device", "cpu"),
        *("--seq-len", "96", "--batch-size", "2", "--epochs", "20", "--lr", "3e-3", *flags),
    ]


def train(base, output, *flags, steps=6, **options):
    return run_recipe("vlm_finetune", *arguments(base, output, *flags, "--max-steps", steps), **options)


def dataset(base):
    tokenizer, template, processor = tiny_vision.parts()
    return load_dataset(base / "rows.jsonl", tokenizer, template, seq_len=96, image_processor=processor)


PARTS = ("--vision", "lora", "--projector", "full", "--language", "lora", "--no-shuffle", "--max-grad-norm", "0")


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """Losses with every part trained and no memory option."""
    output = tmp_path_factory.mktemp("plain") / "run"
    train(base, output, *PARTS)
    return losses(output)


@pytest.mark.parametrize(
    "flags",
    [
        ("--activations", "none"),
        ("--fused", "--activations", "offload", "--activations-host-gib", "1"),
        ("--batch-size", "1", "--grad-accum", "2"),
        ("--quantize", "none", "--activations", "fast", "--fused"),
        ("--weights", "stream"),
        ("--weights", "disk", "--fused", "--activations", "offload"),
        ("--embedding", "host", "--optimizer", "adamw-host"),
    ],
)
def test_memory_options_train_the_same(base, plain, tmp_path, flags):
    train(base, tmp_path / "run", *PARTS, *flags)
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-5)


def test_four_bits_train_alike(base, plain, tmp_path):
    """The towers' blocks, then the head, too; streamed 4-bit blocks are the same ones."""
    train(base, tmp_path / "nf4", *PARTS, "--quantize", "nf4", "--quantize-head")
    train(base, tmp_path / "streamed", *PARTS, "--quantize", "nf4", "--quantize-head", "--weights", "stream")
    assert losses(tmp_path / "streamed") == pytest.approx(losses(tmp_path / "nf4"), rel=1e-5)
    assert losses(tmp_path / "nf4") == pytest.approx(plain, rel=0.05)
    assert losses(tmp_path / "nf4") != pytest.approx(plain, rel=1e-4)


def test_evaluation_and_a_sample_while_training(base, tmp_path):
    """The sample is what transformers and peft write when they are shown the first row's picture."""
    done = train(base, tmp_path / "run", "--eval-data", base / "rows.jsonl", "--eval-every", "2")
    evaluated = [(row["step"], row["eval_loss"]) for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert [step for step, _ in evaluated] == [2, 4, 6] and evaluated[-1][1] < evaluated[0][1]
    (last,) = [line for line in done.stderr.splitlines() if "step 6: evaluation loss" in line]

    theirs = peft.PeftModel.from_pretrained(HFLlava.from_pretrained(base / "base"), tmp_path / "run/adapter").eval()
    ids, targets = dataset(base)[0]
    prompt = ids[None, : (targets != -100).nonzero()[0].item() + 1].long()
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    given["pixel_values"] = dataset(base).pixel_values(0)
    out = theirs.generate(**given, max_new_tokens=64, do_sample=False)[0, prompt.shape[1] :]
    assert last.endswith(f" → {tiny_vision.parts()[0].decode(out.tolist())!r}")


def about(name, question="<image>\nwhat?"):
    return {"image": name, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "that"}]}


def test_bad_images_are_one_clear_line_or_skipped(base, tmp_path):
    write_rows(base / "bad.jsonl", [*rows(base, 3), about("none.png")])
    done = train(base, tmp_path / "run", "--data", base / "bad.jsonl", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in ("bad.jsonl:4", "none.png", "no such file", "--skip-bad-rows")), line
    done = train(base, tmp_path / "run", "--data", base / "bad.jsonl", "--skip-bad-rows", steps=1)
    assert "3 examples from 4 rows" in done.stderr
    assert "1 row dropped: bad images, as in" in done.stderr and "bad.jsonl:4: image none.png" in done.stderr


def test_no_path_leads_out_of_the_folder(base, tmp_path):
    """Not even with --skip-bad-rows, which is for files that are broken; --image-root is the way out."""
    tiny_vision.draw(30, 40).save(tmp_path / "outside.png")
    write_rows(base / "bad.jsonl", [*rows(base, 3), about(str(tmp_path / "outside.png"))])
    done = train(base, tmp_path / "run", "--data", base / "bad.jsonl", "--skip-bad-rows", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "bad.jsonl:4" in line and "outside.png" in line and "--image-root" in line
    write_rows(base / "bad.jsonl", [about("outside.png")])
    train(base, tmp_path / "run", "--data", base / "bad.jsonl", "--image-root", tmp_path, steps=1)


def test_targets_are_of_the_language_model(base, tmp_path):
    for flags, said in (
        (("--targets", "q_proj", "v_prj"), "--targets v_prj names no linear layer of the language model"),
        (("--targets", "fc1"), "--targets fc1 names no linear layer of the language model"),  # the vision tower's
    ):
        done = train(base, tmp_path / "run", *flags, check=False)
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("recipe", ["lora_finetune", "peft_finetune", "full_finetune", "pretrain"])
def test_recipes_for_text_say_that_it_sees(base, tmp_path, recipe):
    data = ("--data", base / "rows.jsonl", "--output", tmp_path / "run")
    done = run_recipe(recipe, "--model", base / "base", *data, check=False)
    assert (
        done.returncode == 2
        and "vlm_finetune.py trains those with images" in done.stderr
        and "Traceback" not in done.stderr
    )
