"""vlm_finetune.py with a LLaVA and with a SmolVLM, whose images become tiles: no recipe knows which model it has."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Idefics3Config
from transformers import Idefics3ForConditionalGeneration as HFIdefics3
from transformers import LlavaForConditionalGeneration as HFLlava
from transformers import SmolVLMForConditionalGeneration as HFSmolVLM

from checkpointing.adapters import load_adapter
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.batches import Batches
from data.dataset import load_dataset
from models import build_model
from tests.data.images import tiny_tiles, tiny_vision
from tests.models.test_smolvlm import nested
from tests.recipes.test_vlm import VISION, make_llava, rows, train
from tests.tiny import SHAPE, losses, read_metrics, run_recipe, write_rows


def make_smolvlm(folder, split=True):
    """A random Idefics3 with its processor, as transformers saves it."""
    shutil.copytree(tiny_tiles.folder(split), folder)
    torch.manual_seed(0)
    vision = VISION | dict(num_hidden_layers=2, image_size=tiny_tiles.TILE, patch_size=tiny_tiles.PATCH)
    text = SHAPE | dict(model_type="llama", vocab_size=len(tiny_tiles.smolvlm_processor().tokenizer))
    config = tiny_tiles.config() | dict(vision_config=vision, text_config=text)
    model = HFIdefics3(Idefics3Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.08)
    model.save_pretrained(folder)
    return model


@dataclass(frozen=True)
class Family:
    """A folder with `base` and rows.jsonl, and what is needed to ask transformers the same."""

    folder: Path
    oracle: type
    processor: object  # transformers'
    parts: tuple  # our tokenizer, template and image processor
    seq_len: int
    projector: str  # in names of weights

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def reference(self):
        return self.oracle.from_pretrained(self / "base")

    def train(self, output: Path, *flags, **options):
        return train(self.folder, output, "--seq-len", self.seq_len, *flags, **options)

    def dataset(self):
        tokenizer, template, processor = self.parts
        settings = dict(seq_len=self.seq_len, image_processor=processor)
        return load_dataset(self / "rows.jsonl", tokenizer, template, **settings)

    def pixel_values(self, batch) -> dict:
        """The batch's images as transformers takes them."""
        if batch.images is None or self.oracle is HFLlava:
            return {} if batch.images is None else {"pixel_values": batch.images.pixel_values}
        processor = self.parts[2]
        tiles = [row.count(processor.token_id) // processor.tokens for row in batch.input_ids.tolist()]
        return {"pixel_values": nested(batch.images.pixel_values, tiles)}


@pytest.fixture(scope="module", params=["LLaVA", "SmolVLM"])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_rows(folder / "rows.jsonl", rows(folder))
    if request.param == "LLaVA":
        make_llava(folder / "base")
        processor, parts = tiny_vision.llava_processor(), tiny_vision.parts()
        return Family(folder, HFLlava, processor, parts, seq_len=96, projector="multi_modal_projector")
    make_smolvlm(folder / "base")
    processor, parts = tiny_tiles.smolvlm_processor(), tiny_tiles.parts()
    return Family(folder, HFIdefics3, processor, parts, seq_len=320, projector="connector")


def test_twenty_steps_follow_transformers_and_peft(family, tmp_path):
    flags = ("--no-shuffle", "--schedule", "constant", "--rank", "4", "--vision", "lora", "--projector", "lora")
    family.train(tmp_path / "start", *flags, steps=0)
    family.train(tmp_path / "run", *flags, steps=20)
    model = peft.PeftModel.from_pretrained(family.reference(), tmp_path / "start/adapter", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    expected = []
    for _, _, (batch,) in Batches(family.dataset(), batch_size=2).steps(0, 0):
        labels = torch.full(batch.input_ids.shape, -100)
        labels.view(-1)[batch.target_index] = batch.targets
        given = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
        logits = model(**given, **family.pixel_values(batch)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        if len(expected) == 20:
            break
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


def test_packed_rows_do_not_see_each_other(family, tmp_path):
    whole = ("--no-shuffle", "--batch-size", "12")
    family.train(tmp_path / "rows", *whole, steps=1)
    family.train(tmp_path / "packs", *whole, "--packing", steps=1)
    assert losses(tmp_path / "packs") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)


def test_each_part_has_its_learning_rate(family, tmp_path):
    """A rate of 0 leaves a part as it was; the result of full training is a folder that transformers opens."""
    flags = ("--vision", "full", "--projector", "full", "--language", "lora", "--vision-lr", "0")
    family.train(tmp_path / "run", *flags, "--quantize", "nf4", steps=3)
    before = family.reference().state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/model").state_dict()
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name in same for name in before if "vision_" in name)
    assert not any(family.projector in name or "q_proj" in name for name in same if "vision_" not in name)
    processor = AutoProcessor.from_pretrained(tmp_path / "run/model")
    images, text = [Image.open(family / "1.png")], "<image> which one?"
    inputs = [p(text=text, images=images, return_tensors="pt") for p in (processor, family.processor)]
    assert inputs[0].keys() == inputs[1].keys()
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])


def test_resumed_equals_uninterrupted(family, tmp_path):
    flags = ("--projector", "full", "--schedule", "constant", "--save-every", "2", "--vision", "lora")
    flags += ("--dropout", "0.1", "--packing", "--eval-data", family / "rows.jsonl")
    family.train(tmp_path / "whole", *flags, steps=4)
    family.train(tmp_path / "run", *flags, steps=2)
    family.train(tmp_path / "run", *flags, "--resume", steps=4)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    results = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert results[0] == results[1]


def test_a_projector_trained_in_full_travels_with_the_adapter(family, tmp_path):
    flags = ("--projector", "full", "--vision", "lora", "--rank", "4", "--weights", "stream")
    family.train(tmp_path / "run", *flags, "--eval-data", family / "rows.jsonl", steps=4)
    assert not (tmp_path / "run/model").exists()
    adapter = tmp_path / "run/adapter"
    saved = json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"]
    assert all(name.startswith(f"model.{family.projector}") for name in saved) and saved
    ours = build_model(read_config(family / "base"))
    load_weights(ours, WeightFiles(family / "base"), device=torch.device("cpu"), dtype=torch.float32)
    before = {name: p.clone() for name, p in ours.projector.named_parameters()}
    load_adapter(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(family.reference(), adapter).eval()
    assert not any(torch.equal(p, before[name]) for name, p in ours.projector.named_parameters())
    (batch,) = Batches(family.dataset(), batch_size=12).one_epoch()
    with torch.no_grad():
        expected = theirs(input_ids=batch.input_ids, **family.pixel_values(batch)).logits
        found = ours.logits(ours(batch.input_ids, batch.layout, images=batch.images))
    assert (found - expected).abs().max() < 1e-4
    (evaluated,) = [row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    data = ("--data", family / "rows.jsonl", "--device", "cpu")
    run_recipe("merge", "--model", family / "base", "--adapter", adapter, "--output", tmp_path / "merged")
    for model in ((family / "base", "--adapter", adapter), (tmp_path / "merged",)):
        found = json.loads(run_recipe("evaluate", "--model", *model, *data).stdout)
        assert found["loss"] == pytest.approx(evaluated, rel=1e-5)


@pytest.mark.parametrize("family", ["SmolVLM"], indirect=True)
@pytest.mark.parametrize("flags", [("--activations", "offload"), ("--weights", "stream", "--embedding", "host")])
def test_memory_options_train_the_same(family, tmp_path, flags):
    parts = ("--vision", "lora", "--projector", "full", "--no-shuffle", "--max-grad-norm", "0")
    family.train(tmp_path / "plain", *parts, "--activations", "none", steps=4)
    family.train(tmp_path / "run", *parts, "--fused", *flags, steps=4)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "oracle"), [("LLaVA", None), ("SmolVLM", None), ("SmolVLM", HFSmolVLM)], indirect=["family"]
)
def test_evaluate_generate_and_merge(family, tmp_path, oracle):
    """Of the folder as it is, and of a SmolVLM, an Idefics3 by another name."""
    model, processor, pictures = tmp_path / "base", family.processor, [family / "1.png", family / "2.png"]
    shutil.copytree(family / "base", model)
    if oracle:
        config = json.loads((model / "config.json").read_text())
        config |= {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"]}
        config["vision_config"]["model_type"] = "smolvlm_vision"
        (model / "config.json").write_text(json.dumps(config))
    rows = ("--data", family / "rows.jsonl", "--device", "cpu")
    flags = ("--model", model, "--eval-data", family / "rows.jsonl", "--vision", "lora", "--rank", "4")
    family.train(tmp_path / "run", *flags, steps=4)
    (expected,) = [row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    adapter = ("--adapter", tmp_path / "run/adapter")
    run_recipe("merge", "--model", model, *adapter, "--output", tmp_path / "merged")
    for folder, more in ((model, adapter), (tmp_path / "merged", ())):
        found = json.loads(run_recipe("evaluate", "--model", folder, *more, *rows).stdout)["loss"]
        assert found == pytest.approx(expected, rel=1e-5)

    ask = ("--prompt", "which one is it?", "--max-new-tokens", 8, "--device", "cpu", "--image")
    said = run_recipe("generate", "--model", tmp_path / "merged", *ask, *pictures).stdout
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which one is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(picture) for picture in pictures], return_tensors="pt")
    reference = (oracle or family.oracle).from_pretrained(tmp_path / "merged")
    out = reference.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.rstrip("\n") == expected.rstrip("\n")
    wrong = run_recipe("generate", "--model", tmp_path / "merged", *ask, family / "no.png", check=False)
    assert wrong.returncode == 2 and "no.png" in wrong.stderr


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--quantize", "nf4", "--quantize-head", "--weights", "stream"),
        ("--quantize", "int4"),
        ("--weights", "disk", "--embedding", "host"),
    ],
)
def test_the_projector_alone(family, tmp_path, flags):
    """Only the projector changes, whatever the towers were rounded to while training; stage 2 goes on from there."""
    run_recipe(
        "vlm_pretrain_projector",
        *("--model", family / "base", "--data", family / "rows.jsonl", "--output", tmp_path / "run", "--device", "cpu"),
        *("--batch-size", "2", "--max-steps", "2", "--init-projector", "--lr", "1e-2", *flags),
    )
    before = family.reference().state_dict()
    after = family.oracle.from_pretrained(tmp_path / "run/model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if family.projector in name}
    family.train(tmp_path / "next", "--model", tmp_path / "run/model", steps=1)


@pytest.mark.parametrize("family", ["SmolVLM"], indirect=True)
def test_a_sample_of_a_text_does_not_cut_an_image(family, tmp_path):
    """Its beginning is continued, the first 32 tokens, which here end among an image's."""
    data = write_rows(family / "texts.jsonl", [{"image": "0.png", "text": "hello <image> " + "world " * 90}])
    family.train(tmp_path / "run", "--data", data, "--eval-data", data, steps=1)
