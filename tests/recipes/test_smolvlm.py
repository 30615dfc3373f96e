"""The recipes of test_vlm.py with a SmolVLM, whose images become tiles: no recipe knows which model it has."""

import json
import shutil

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Idefics3Config
from transformers import Idefics3ForConditionalGeneration as HFIdefics3
from transformers import SmolVLMForConditionalGeneration as HFSmolVLM

from checkpointing.adapters import load_adapter
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.batches import Batches
from data.chat.contents import as_parts
from data.dataset import load_dataset
from data.json_rows import read_rows
from data.row_formats import parse_row
from models import build_model
from tests.data.images import tiny_tiles
from tests.models.test_smolvlm import nested
from tests.recipes.test_vlm import rows, train
from tests.tiny import losses, read_metrics, run_recipe, write_rows

SEQ_LEN = ("--seq-len", "320")


def make_smolvlm(folder, split=True):
    """A random Idefics3 with its processor, as transformers saves it."""
    shutil.copytree(tiny_tiles.folder(split), folder)
    torch.manual_seed(0)
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=tiny_tiles.TILE,
        patch_size=tiny_tiles.PATCH,
    )
    text = dict(
        model_type="llama",
        vocab_size=len(tiny_tiles.smolvlm_processor().tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
    )
    config = tiny_tiles.config() | dict(vision_config=vision, text_config=text)
    model = HFIdefics3(Idefics3Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.08)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvlm")
    make_smolvlm(folder / "base")
    write_rows(folder / "rows.jsonl", rows(folder))
    return folder


@pytest.mark.parametrize("split", [True, False])
def test_logits_from_files_to_the_head(tmp_path, split):
    """Rows of a data file with two images, none and one, against transformers' processor and model."""
    reference = make_smolvlm(tmp_path / "base", split).eval()
    data = write_rows(tmp_path / "rows.jsonl", rows(tmp_path)[5:2:-1])
    tokenizer, template, processor = tiny_tiles.parts(split=split)
    dataset = load_dataset(data, tokenizer, template, seq_len=None, image_processor=processor)
    (batch,) = Batches(dataset, batch_size=3).one_epoch()
    assert len(batch.pixel_values) == (27 if split else 3)

    words = []
    for example in read_rows(data):
        content, answer = (message["content"] for message in parse_row(example[1], with_images=True).messages)
        messages = [{"role": "user", "content": as_parts(content)}, {"role": "assistant", "content": as_parts(answer)}]
        words.append(tiny_tiles.smolvlm_processor(split).apply_chat_template(messages))
    pictures = [[Image.open(tmp_path / dataset.images.names[n]) for n in dataset.images.of(i)] for i in range(3)]
    oracle = tiny_tiles.smolvlm_processor(split)
    oracle.tokenizer.pad_token, oracle.tokenizer.padding_side = "</s>", "right"
    inputs = oracle(text=words, images=pictures, padding=True, return_tensors="pt")
    real = inputs["attention_mask"] == 1
    assert torch.equal(batch.input_ids[real], inputs["input_ids"][real])
    model = build_model(read_config(tmp_path / "base"))
    load_weights(model, WeightFiles(tmp_path / "base"), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        logits = model.logits(model(batch.input_ids, batch.layout, images=batch.images))
        assert (logits - reference(**inputs).logits)[real].abs().max() < 1e-5


def as_theirs(batch):
    """The batch's tiles as transformers takes them."""
    _, _, processor = tiny_tiles.parts()
    tiles = [row.count(processor.token_id) // processor.tokens for row in batch.input_ids.tolist()]
    return nested(batch.pixel_values, tiles)


def test_twenty_steps_follow_transformers_and_peft(base, tmp_path):
    flags = ("--no-shuffle", "--schedule", "constant", "--rank", "4", "--vision", "lora", "--projector", "lora")
    train(base, tmp_path / "start", *flags, *SEQ_LEN, steps=0)
    train(base, tmp_path / "run", *flags, *SEQ_LEN, steps=20)
    reference = HFIdefics3.from_pretrained(base / "base")
    model = peft.PeftModel.from_pretrained(reference, tmp_path / "start/adapter", is_trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 * 6 + 1 + 2 * 7)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    tokenizer, template, processor = tiny_tiles.parts()
    dataset = load_dataset(base / "rows.jsonl", tokenizer, template, seq_len=320, image_processor=processor)
    assert dataset.report.images == 12 and dataset.report.tiles == 111
    expected = []
    for _, _, (batch,) in Batches(dataset, batch_size=2).steps(0, 0):
        labels = torch.full(batch.input_ids.shape, -100)
        labels.view(-1)[batch.target_index] = batch.targets
        given = {} if batch.pixel_values is None else {"pixel_values": as_theirs(batch)}
        logits = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), **given).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        if len(expected) == 20:
            break
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("flags", [("--activations", "offload"), ("--weights", "stream", "--embedding", "host")])
def test_measures_train_the_same(base, tmp_path, flags):
    parts = ("--vision", "lora", "--projector", "full", "--no-shuffle", "--max-grad-norm", "0", *SEQ_LEN)
    train(base, tmp_path / "plain", *parts, "--activations", "none", steps=4)
    train(base, tmp_path / "run", *parts, "--fused", *flags, steps=4)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_packed_rows_do_not_see_each_other(base, tmp_path):
    whole = ("--no-shuffle", *SEQ_LEN, "--batch-size", "12")
    train(base, tmp_path / "rows", *whole, steps=1)
    train(base, tmp_path / "packs", *whole, "--packing", steps=1)
    assert losses(tmp_path / "packs") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)


def test_each_part_has_its_learning_rate(base, tmp_path):
    """A rate of 0 leaves a part as it was; the result of full training is a folder that transformers opens."""
    flags = ("--vision", "full", "--projector", "full", "--language", "lora", "--vision-lr", "0", *SEQ_LEN)
    train(base, tmp_path / "run", *flags, "--quantize", "nf4", steps=3)
    before = HFIdefics3.from_pretrained(base / "base").state_dict()
    after = HFIdefics3.from_pretrained(tmp_path / "run/model").state_dict()
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name in same for name in before if "vision_model" in name)
    assert not any("connector" in name or "q_proj" in name for name in same if "vision_model" not in name)
    processor = AutoProcessor.from_pretrained(tmp_path / "run/model")
    images, text = [Image.open(base / "1.png")], "<image> which one?"
    inputs = [p(text=text, images=images, return_tensors="pt") for p in (processor, tiny_tiles.smolvlm_processor())]
    assert inputs[0].keys() == inputs[1].keys()
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])


def test_resumed_equals_uninterrupted(base, tmp_path):
    flags = ("--projector", "full", "--schedule", "constant", "--save-every", "2", *SEQ_LEN)
    train(base, tmp_path / "whole", *flags, steps=4)
    train(base, tmp_path / "run", *flags, steps=2)
    train(base, tmp_path / "run", *flags, "--resume", steps=4)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    results = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert results[0] == results[1]


def test_a_whole_connector_travels_with_the_adapter(base, tmp_path):
    train(base, tmp_path / "run", "--projector", "full", "--vision", "lora", "--rank", "4", *SEQ_LEN, steps=3)
    adapter = tmp_path / "run/adapter"
    ours = build_model(read_config(base / "base"))
    load_weights(ours, WeightFiles(base / "base"), device=torch.device("cpu"), dtype=torch.float32)
    before = ours.projector.modality_projection.proj.weight.clone()
    load_adapter(ours, adapter)
    assert not torch.equal(dict(ours.projector.named_parameters())["modality_projection.proj.weight"], before)
    theirs = peft.PeftModel.from_pretrained(HFIdefics3.from_pretrained(base / "base"), adapter).eval()
    tokenizer, template, processor = tiny_tiles.parts()
    dataset = load_dataset(base / "rows.jsonl", tokenizer, template, seq_len=None, image_processor=processor)
    (batch,) = Batches(dataset, batch_size=12).one_epoch()
    with torch.no_grad():
        expected = theirs(input_ids=batch.input_ids, pixel_values=as_theirs(batch)).logits
        found = ours.logits(ours(batch.input_ids, batch.layout, images=batch.images))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_evaluate_generate_and_merge(base, tmp_path, kind):
    model = tmp_path / "base"
    shutil.copytree(base / "base", model)
    config = json.loads((model / "config.json").read_text())
    oracle = {"idefics3": HFIdefics3, "smolvlm": HFSmolVLM}[kind]
    config |= {"model_type": kind, "architectures": [oracle.__name__.removeprefix("HF")]}
    config["vision_config"]["model_type"] = f"{kind}_vision"
    (model / "config.json").write_text(json.dumps(config))
    flags = ("--model", model, "--eval-data", base / "rows.jsonl", "--vision", "lora", "--rank", "4", *SEQ_LEN)
    train(base, tmp_path / "run", *flags, steps=4)
    adapter = ("--adapter", tmp_path / "run/adapter", "--device", "cpu")
    found = run_recipe("evaluate", "--model", model, "--data", base / "rows.jsonl", *adapter).stdout
    (expected,) = [row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert json.loads(found)["loss"] == pytest.approx(expected, rel=1e-5)
    run_recipe("merge", "--model", model, "--adapter", tmp_path / "run/adapter", "--output", tmp_path / "merged")
    merged = run_recipe("evaluate", "--model", tmp_path / "merged", "--data", base / "rows.jsonl", "--device", "cpu")
    assert json.loads(merged.stdout)["loss"] == pytest.approx(expected, rel=1e-5)

    pictures = (base / "1.png", base / "2.png")
    ask = ("--prompt", "which one is it?", "--max-new-tokens", 8, "--device", "cpu", "--image", *pictures)
    said = run_recipe("generate", "--model", tmp_path / "merged", *ask).stdout
    processor = tiny_tiles.smolvlm_processor()
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which one is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(picture) for picture in pictures], return_tensors="pt")
    out = oracle.from_pretrained(tmp_path / "merged").generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.rstrip("\n") == expected.rstrip("\n")


def test_the_connector_alone(base, tmp_path):
    run_recipe(
        "vlm_pretrain_projector",
        *("--model", base / "base", "--data", base / "rows.jsonl", "--output", tmp_path / "run", "--device", "cpu"),
        *("--batch-size", "2", "--max-steps", "2", "--init-projector", "--lr", "1e-2"),
    )
    before = HFIdefics3.from_pretrained(base / "base").state_dict()
    after = HFIdefics3.from_pretrained(tmp_path / "run/model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.connector.modality_projection.proj.weight"}


def test_rows_whose_images_do_not_fit_are_dropped_and_said(base, tmp_path):
    done = train(base, tmp_path / "run", "--seq-len", "130", steps=1)
    assert "4 images in 37 tiles of 4 tokens each among them" in done.stderr
    assert "4 rows dropped: the images do not fit into --seq-len 130 (images are never cut)" in done.stderr


def test_a_sample_of_a_text_does_not_cut_an_image(base, tmp_path):
    """Its beginning is continued, the first 32 tokens, which here end among an image's."""
    data = write_rows(base / "texts.jsonl", [{"image": "0.png", "text": "hello <image> " + "world " * 90}])
    train(base, tmp_path / "run", "--data", data, "--eval-data", data, *SEQ_LEN, steps=1)
