"""vlm_finetune.py and what takes its results: parity with transformers + peft, packing, measures, resume, bad rows."""

import json
import shutil
import signal
import struct
import time
import zlib

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as HFLlava

from checkpointing.adapters import load_adapter
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.batches import Batches
from data.dataset import load_dataset
from models import build_model
from tests.data.images import tiny_vision
from tests.tiny import losses, read_metrics, run_recipe, start_recipe, write_rows

TOKENS = tiny_vision.TOKENS


def make_llava(folder):
    """A random LLaVA with its processor, as transformers saves it."""
    shutil.copytree(tiny_vision.folder(), folder)
    processor = tiny_vision.llava_processor()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=tiny_vision.SIDE,
        patch_size=tiny_vision.PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
    )
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


def test_twenty_steps_follow_transformers_and_peft(base, tmp_path):
    flags = ("--no-shuffle", "--schedule", "constant", "--rank", "4", "--projector", "lora")
    train(base, tmp_path / "start", *flags, steps=0)
    train(base, tmp_path / "run", *flags, steps=20)
    reference = HFLlava.from_pretrained(base / "base")
    model = peft.PeftModel.from_pretrained(reference, tmp_path / "start/adapter", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    expected = []
    for _, _, (batch,) in Batches(dataset(base), batch_size=2).steps(0, 0):
        labels = torch.full(batch.input_ids.shape, -100)
        labels.view(-1)[batch.target_index] = batch.targets
        given = {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values}
        logits = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), **given).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        if len(expected) == 20:
            break
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


PARTS = ("--vision", "lora", "--projector", "full", "--language", "lora", "--no-shuffle", "--max-grad-norm", "0")


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """Losses with every part trained and no measure taken."""
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
def test_measures_train_the_same(base, plain, tmp_path, flags):
    train(base, tmp_path / "run", *PARTS, *flags)
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-5)


def test_four_bits_train_alike(base, plain, tmp_path):
    """The towers' blocks, then the head, too; streamed 4-bit blocks are the same ones."""
    train(base, tmp_path / "nf4", *PARTS, "--quantize", "nf4", "--quantize-head")
    train(base, tmp_path / "streamed", *PARTS, "--quantize", "nf4", "--quantize-head", "--weights", "stream")
    assert losses(tmp_path / "streamed") == pytest.approx(losses(tmp_path / "nf4"), rel=1e-5)
    assert losses(tmp_path / "nf4") == pytest.approx(plain, rel=0.05)
    assert losses(tmp_path / "nf4") != pytest.approx(plain, rel=1e-4)


def test_packed_rows_do_not_see_each_other(base, tmp_path):
    whole = ("--no-shuffle", "--seq-len", "96")
    train(base, tmp_path / "rows", *whole, "--batch-size", "12", steps=1)
    train(base, tmp_path / "packs", *whole, "--batch-size", "12", "--packing", steps=1)
    assert losses(tmp_path / "packs") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)


def test_each_part_has_its_learning_rate(base, tmp_path):
    """A rate of 0 leaves a part as it was; the result of full training is a folder that transformers opens."""
    flags = ("--vision", "full", "--projector", "full", "--language", "lora", "--vision-lr", "0")
    train(base, tmp_path / "run", *flags, "--quantize", "nf4", steps=3)
    before = HFLlava.from_pretrained(base / "base").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/model").state_dict()
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name in same for name in before if "vision_tower" in name)
    assert not any("multi_modal_projector" in name for name in same)
    assert (tmp_path / "run/model/processor_config.json").is_file()


def test_resumed_equals_uninterrupted(base, tmp_path):
    flags = ("--projector", "full", "--schedule", "constant", "--save-every", "2", "--eval-data", base / "rows.jsonl")
    train(base, tmp_path / "whole", *flags)
    train(base, tmp_path / "run", *flags, steps=2)
    train(base, tmp_path / "run", *flags, "--resume")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    results = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert results[0] == results[1]


def test_a_whole_projector_travels_with_the_adapter(base, tmp_path):
    flags = ("--projector", "full", "--vision", "lora", "--rank", "4", "--weights", "stream")
    train(base, tmp_path / "run", *flags, "--eval-data", base / "rows.jsonl")
    assert not (tmp_path / "run/model").exists()
    adapter = tmp_path / "run/adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == [
        "model.multi_modal_projector"
    ]
    ours = build_model(read_config(base / "base"))
    load_weights(ours, WeightFiles(base / "base"), device=torch.device("cpu"), dtype=torch.float32)
    before = {name: p.clone() for name, p in ours.projector.named_parameters()}
    load_adapter(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(HFLlava.from_pretrained(base / "base"), adapter).eval()
    for name, parameter in ours.projector.named_parameters():
        assert not torch.equal(parameter, before[name])
    (batch,) = Batches(dataset(base), batch_size=12).one_epoch()
    with torch.no_grad():
        expected = theirs(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits
        found = ours.logits(ours(batch.input_ids, batch.layout, images=batch.images))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    arguments = ("--model", base / "base", "--adapter", adapter, "--data", base / "rows.jsonl", "--device", "cpu")
    (evaluated,) = [row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert json.loads(run_recipe("evaluate", *arguments).stdout)["loss"] == pytest.approx(evaluated, rel=1e-5)
    run_recipe("merge", *arguments[:4], "--output", tmp_path / "merged")
    merged = run_recipe("evaluate", "--model", tmp_path / "merged", *arguments[4:])
    assert json.loads(merged.stdout)["loss"] == pytest.approx(evaluated, rel=1e-5)


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


def test_killed_and_resumed_equals_uninterrupted(base, tmp_path):
    flags = ("--vision", "lora", "--projector", "full", "--dropout", "0.1", "--packing", "--save-every", "3")
    train(base, tmp_path / "whole", *flags, steps=40)
    metrics = tmp_path / "killed/metrics.jsonl"
    run = arguments(base, tmp_path / "killed", *flags, "--max-steps", 40, "--resume")
    process = start_recipe("vlm_finetune", *run)
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("grad_norm") < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_recipe("vlm_finetune", *run)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")  # bit for bit
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_evaluate_generate_and_merge(base, tmp_path):
    train(base, tmp_path / "run", "--eval-data", base / "rows.jsonl", "--rank", "4")
    adapter = ("--adapter", tmp_path / "run/adapter", "--device", "cpu")
    found = run_recipe("evaluate", "--model", base / "base", "--data", base / "rows.jsonl", *adapter).stdout
    (expected,) = [row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert json.loads(found)["loss"] == pytest.approx(expected, rel=1e-5)
    run_recipe(
        "merge", "--model", base / "base", "--adapter", tmp_path / "run/adapter", "--output", tmp_path / "merged"
    )
    merged = run_recipe("evaluate", "--model", tmp_path / "merged", "--data", base / "rows.jsonl", "--device", "cpu")
    assert json.loads(merged.stdout)["loss"] == pytest.approx(expected, rel=1e-5)

    ask = ("--prompt", "which one is it?", "--image", base / "1.png", "--max-new-tokens", 8)
    said = run_recipe("generate", "--model", tmp_path / "merged", *ask, "--device", "cpu").stdout
    reference = HFLlava.from_pretrained(tmp_path / "merged")
    processor = tiny_vision.llava_processor()
    content = [{"type": "image"}, {"type": "text", "text": "which one is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    from PIL import Image

    inputs = processor(text=text, images=Image.open(base / "1.png"), return_tensors="pt")
    out = reference.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.rstrip("\n") == expected
    wrong = run_recipe("generate", "--model", tmp_path / "merged", *ask[:2], "--image", base / "no.png", check=False)
    assert wrong.returncode == 2 and "no.png" in wrong.stderr


def broken_files(base):
    """What a stranger's data may name, and what is said of it."""
    whole = (base / "0.png").read_bytes()
    (base / "cut.png").write_bytes(whole[: len(whole) // 2])
    (base / "words.png").write_text("this is no image")
    chunk = struct.pack(">4s2I5B", b"IHDR", 30000, 30000, 8, 2, 0, 0, 0)  # a header is enough
    chunk = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (base / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    return {"none.png": "no such file", "cut.png": "broken", "words.png": "not an image", "bomb.png": "bomb"}


def about(name, question="<image>\nwhat?"):
    return {"image": name, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "that"}]}


def test_bad_images_are_one_clear_line_or_skipped(base, tmp_path):
    reasons = broken_files(base)
    for name, reason in reasons.items():
        write_rows(base / "bad.jsonl", [*rows(base, 3), about(name)])
        done = train(base, tmp_path / "run", "--data", base / "bad.jsonl", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert all(part in line for part in ("bad.jsonl:4", name, reason, "--skip-bad-rows")), line
    write_rows(base / "bad.jsonl", [about(name) for name in reasons] + rows(base, 3))
    done = train(base, tmp_path / "run", "--data", base / "bad.jsonl", "--skip-bad-rows", steps=1)
    assert "3 examples from 7 rows" in done.stderr
    assert "4 rows dropped: bad images, as in" in done.stderr and "bad.jsonl:1: image none.png" in done.stderr


def test_no_path_leads_out_of_the_folder(base, tmp_path):
    """Not even with --skip-bad-rows, which is for files that are broken; --image-root is the way out."""
    outside = tmp_path / "outside.png"
    tiny_vision.draw(30, 40).save(outside)
    (base / "link.png").unlink(missing_ok=True)
    (base / "link.png").symlink_to(outside)
    for name in (f"../{outside.name}", str(outside), "link.png", "https://example.org/a.png"):
        write_rows(base / "bad.jsonl", [*rows(base, 3), about(name)])
        done = train(base, tmp_path / "run", "--data", base / "bad.jsonl", "--skip-bad-rows", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "bad.jsonl:4" in line and name in line
        assert "--image-root" in line or "nothing is downloaded" in line
    write_rows(base / "bad.jsonl", [about(outside.name)])
    train(base, tmp_path / "run", "--data", base / "bad.jsonl", "--image-root", tmp_path, steps=1)


def test_images_and_placeholders_must_be_as_many(base, tmp_path):
    write_rows(base / "bad.jsonl", [*rows(base, 3), about(["0.png", "1.png"])])
    done = train(base, tmp_path / "run", "--data", base / "bad.jsonl", check=False)
    assert done.returncode == 2 and "<image>" in done.stderr and "bad.jsonl:4" in done.stderr


def test_what_cannot_work(base, tmp_path):
    done = train(base, tmp_path / "run", "--language", "frozen", check=False)
    assert done.returncode == 2 and "nothing to train" in done.stderr
    for flags, said in (
        (("--language", "full", "--weights", "stream"), "not with --language full"),
        (("--language", "full", "--embedding", "host"), "not with --language full"),
        (("--quantize-head",), "needs --quantize nf4"),
        (("--targets", "q_proj", "v_prj"), "--targets v_prj names no linear layer of the language model"),
        (("--targets", "fc1"), "--targets fc1 names no linear layer of the language model"),  # the vision tower's
        (("--quantize-head", "--quantize", "nf4", "--language", "full"), "quantised weights are frozen"),
    ):
        done = train(base, tmp_path / "run", *flags, check=False)
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--quantize", "nf4", "--quantize-head", "--weights", "stream"),
        ("--quantize", "int4"),
        ("--weights", "disk", "--embedding", "host"),
    ],
)
def test_the_projector_alone(base, tmp_path, flags):
    """Only the projector changes, whatever the towers were rounded to while training; stage 2 goes on from there."""
    run_recipe(
        "vlm_pretrain_projector",
        *("--model", base / "base", "--data", base / "rows.jsonl", "--output", tmp_path / "run", "--device", "cpu"),
        *("--batch-size", "2", "--max-steps", "4", "--init-projector", "--lr", "1e-2", *flags),
    )
    before = HFLlava.from_pretrained(base / "base").state_dict()
    after = HFLlava.from_pretrained(tmp_path / "run/model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    train(base, tmp_path / "next", "--model", tmp_path / "run/model", steps=1)


@pytest.mark.parametrize("recipe", ["lora_finetune", "peft_finetune", "full_finetune", "pretrain"])
def test_recipes_for_text_say_that_it_sees(base, tmp_path, recipe):
    data = ("--data", base / "rows.jsonl", "--output", tmp_path / "run")
    done = run_recipe(recipe, "--model", base / "base", *data, check=False)
    assert done.returncode == 2 and "trained by vlm_finetune.py" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ("--vision", "lora", "--vision-lr", "-1"),
        ("--language-lr", "nan"),
        ("--lr", "0", "--vision", "lora", "--vision-lr", "1e-3"),
    ],
)
def test_learning_rates_are_positive(base, tmp_path, flags):
    done = train(base, tmp_path / "run", *flags, check=False)
    assert done.returncode == 2 and "must be a positive number" in done.stderr and "Traceback" not in done.stderr
