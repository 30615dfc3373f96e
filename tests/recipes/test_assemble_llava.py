"""recipes/assemble_llava.py: a LLaVA of two folders, opened by transformers, trained by stage 1."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
)

from tests.data.images import tiny_vision
from tests.recipes import test_vlm
from tests.tiny import CHATML, losses, make_checkpoint, run_recipe, write_rows

VISION = test_vlm.VISION | dict(image_size=tiny_vision.SIDE, patch_size=tiny_vision.PATCH)


def make_clip(folder, kind):
    torch.manual_seed(1)
    if kind == "CLIPModel":
        text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    model.save_pretrained(folder)
    side = tiny_vision.SIDE
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    return (model.vision_model if kind == "CLIPModel" else model).state_dict()


def assemble(folder, *flags, **options):
    parts = ("--vision-tower", folder / "clip", "--language-model", folder / "llama", "--output", folder / "llava")
    return run_recipe("assemble_llava", *parts, *flags, **options)


@pytest.mark.parametrize(("kind", "tied"), [("CLIPModel", False), ("CLIPVisionModel", True)])
def test_the_parts_are_in_it_and_transformers_opens_it(tmp_path, kind, tied):
    eye = make_clip(tmp_path / "clip", kind)
    llama = make_checkpoint(tmp_path / "llama", tie_word_embeddings=tied)
    assemble(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").eval()
    weights = model.state_dict()
    for name, tensor in eye.items():
        name = name.removeprefix("vision_model.")
        if "position_ids" not in name:
            assert torch.equal(weights[f"model.vision_tower.{name}"], tensor), name
    old = llama.config.vocab_size
    for name, tensor in llama.model.state_dict().items():
        found = weights[f"model.language_model.{name}"]
        assert torch.equal(found[: len(tensor)], tensor), name
    embedding, head = weights["model.language_model.embed_tokens.weight"], weights["lm_head.weight"]
    assert len(embedding) == len(head) == -(-(old + 2) // 64) * 64
    torch.testing.assert_close(embedding[old:], embedding[:old].mean(0).expand(len(embedding) - old, -1))
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert weights["model.multi_modal_projector.linear_1.weight"].std().item() == pytest.approx(0.02, rel=0.1)

    # Text alone is what the Llama says; the tokenizer is its own with two tokens more.
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    assert (processor.tokenizer.convert_tokens_to_ids("<image>"), processor.tokenizer.pad_token) == (old, "<pad>")
    ids = processor.tokenizer("the quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :old], llama.eval()(ids).logits, atol=1e-5, rtol=0)
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=tiny_vision.draw(40, 30), return_tensors="pt")
    assert (inputs["input_ids"] == old).sum() == tiny_vision.TOKENS
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (old, old + 1)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    tiny_vision.draw(40, 30).save(tmp_path / "a.png")
    ask = ("--prompt", "what is it?", "--image", tmp_path / "a.png", "--max-new-tokens", 6, "--device", "cpu")
    said = run_recipe("generate", "--model", tmp_path / "llava", *ask).stdout
    assert said.removesuffix("\n") == processor.tokenizer.decode(expected, skip_special_tokens=True)


def test_stage_one_goes_on_from_it(tmp_path):
    make_clip(tmp_path / "clip", "CLIPVisionModel")
    make_checkpoint(tmp_path / "llama", chat_template=CHATML)
    assemble(tmp_path, "--dtype", "float32", "--feature-layer", -1, "--select", "full")
    assert (tmp_path / "llava/chat_template.jinja").read_text() == CHATML  # the Llama's own
    tiny_vision.draw(40, 30).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a fox"}]
    write_rows(tmp_path / "rows.jsonl", [{"image": "a.png", "conversations": turns}] * 4)
    run = ("--model", tmp_path / "llava", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run")
    run_recipe("vlm_pretrain_projector", *run, "--device", "cpu", "--epochs", 4, "--lr", "1e-2")
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.1
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "run/model"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "multi_modal_projector" in name
    }


def test_what_cannot_be_put_together(tmp_path):
    make_clip(tmp_path / "clip", "CLIPVisionModel")
    make_checkpoint(tmp_path / "llama")
    swapped = ("--vision-tower", tmp_path / "llama", "--language-model", tmp_path / "clip")
    done = run_recipe("assemble_llava", *swapped, "--output", tmp_path / "llava", check=False)
    assert done.returncode == 2 and "--vision-tower" in done.stderr and "LlamaForCausalLM" in done.stderr
    settings = json.loads((tmp_path / "clip/preprocessor_config.json").read_text())
    (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps(settings | {"crop_size": 20}))
    done = assemble(tmp_path, check=False)
    assert done.returncode == 2 and "20 x 20" in done.stderr and not (tmp_path / "llava").exists()
    (tmp_path / "clip/preprocessor_config.json").unlink()
    done = assemble(tmp_path, check=False)
    assert done.returncode == 2 and "no image processor" in done.stderr
    shutil.copytree(tmp_path / "llama", tmp_path / "llava")
    assert "exists already" in assemble(tmp_path, check=False).stderr
    assert LlamaForCausalLM.from_pretrained(tmp_path / "llava")
