"""Watch a model learn to see: two to five minutes of one CPU core, nothing to download.

    python recipes/quickstart_vlm.py

A small LLaVA, CLIP-ViT, projector and Llama, begins with random weights in a world of colored shapes. Two copies of it
train on the same questions and answers, one with its eyes shut: it is shown blank paper instead of every picture. That
one learns to speak, and guesses. Both are examined with pictures of what no training picture shows: a quarter of all
combinations of number, color, shape and place is held out. An answer counts only if every word is right. The training
is that of recipes/vlm_finetune.py, called with the settings that its command line takes; the pictures come from
quickstart_world.py.
"""

import json
import os
import random
import sys
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors  # isort: split

import sentencepiece
import torch
import tyro

from checkpointing.atomic import atomic_folder, claim_folder, make_folder
from checkpointing.export import save_model
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.chat.templates import load_chat_template
from data.images.files import load_image
from data.images.load import load_image_processor
from data.tokenizers.load import load_tokenizer
from models import build_model
from modules.generation import generate
from modules.image_tokens import place_images
from recipes import vlm_finetune
from recipes.quickstart import write_rows
from recipes.quickstart_world import DESCRIBE, Scene, draw, draw_answers, make_scene, questions

SIDE, PATCH = 48, 12  # pixels
BLANK = "pictures/blank.png"
SHUT_STEPS = 250  # with eyes shut it does not get better after that

# A turn of a chat is "Q: <image> What do you see? A: two red circles top left</s>".
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'Q: ' if message['role'] == 'user' else ' ' }}"
    "{% for part in message['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' A:' if message['role'] == 'user' else eos_token + ' ' }}{% endfor %}"
)
MODEL = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,  # small models like it large
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,
    },
}


@dataclass
class Config:
    output: Path = Path("runs/quickstart_vlm")
    """Folder for pictures, rows, both runs and the answers; an earlier quickstart there is replaced."""
    train_pictures: int = 6000
    """Pictures to learn from."""
    held_out_pictures: int = 200
    """Pictures to be examined with."""
    epochs: int = 10
    """Passes over the training pictures."""
    lr: float = 2e-3
    """Peak learning rate: small models like it high."""
    seed: int = 0
    """Seed of the pictures, of the first weights and of the training."""


def main(cfg: Config) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain little from more, and one gives the same numbers on any CPU
    claim_folder(cfg.output, "quickstart_vlm.py", ("start", "pictures", "shut", "open"))
    rng = random.Random(cfg.seed)
    scenes = [make_scene(rng, 1 + (i % 5 > 1), held_out=False) for i in range(cfg.train_pictures)]
    write_training(cfg.output, scenes, rng)
    held_out = [make_scene(rng, 1 + i % 2, held_out=True) for i in range(cfg.held_out_pictures)]
    exam = write_exam(cfg.output, held_out)
    write_start(cfg.output / "start", scenes, cfg.seed)

    results = {}
    for title, name, steps in (("eyes shut", "shut", SHUT_STEPS), ("eyes open", "open", None)):
        print(f"\n{title}: recipes/vlm_finetune.py --data {name}.jsonl", file=sys.stderr)
        settings = vlm_finetune.Config(
            model=str(cfg.output / "start"),
            data=cfg.output / f"{name}.jsonl",
            output=cfg.output / name,
            vision="full",
            projector="full",
            language="full",
            max_steps=steps,
            epochs=cfg.epochs,
            batch_size=32,
            lr=cfg.lr,
            warmup_steps=30,
            activations="none",
            image_workers=1,
            device="cpu",
            seed=cfg.seed,
        )
        training = time.perf_counter()
        vlm_finetune.main(settings)
        seconds = time.perf_counter() - training
        shown = [cfg.output / (BLANK if name == "shut" else row["picture"]) for row in exam]
        results[title] = {"answers": examine(cfg.output / name / "model", exam, shown), "seconds": seconds}
    print(report(cfg, exam, held_out, results))
    print(f"\nThis took {time.perf_counter() - started:.0f} s in all.")


# ---------------------------------------------------------------------------------------------------------------------
# Rows, and a model that knows nothing


def write_training(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    """The pictures, rows about them in LLaVA's form, and the same rows with blank paper for a picture."""
    make_folder(folder / "pictures")
    draw([], SIDE).save(folder / BLANK)
    rows = []
    for i, scene in enumerate(scenes):
        draw(scene, SIDE).save(folder / f"pictures/{i}.png")
        described, *asked = questions(scene)
        chats = [rng.sample(asked, len(asked))] if asked else []
        chats += [[described]] if not asked or i % 2 else []  # two groups are harder to describe: they come more often
        rows += [{"image": f"pictures/{i}.png", "conversations": chat(turns)} for turns in chats]
    write_rows(folder / "open.jsonl", rows)
    write_rows(folder / "shut.jsonl", [row | {"image": BLANK} for row in rows])


def chat(turns: list[tuple[str, str]]) -> list[dict]:
    """A picture, then question, answer, question …"""
    said = [words for turn in turns for words in turn]
    said[0] = f"<image>\n{said[0]}"
    return [{"from": ("human", "gpt")[i % 2], "value": words} for i, words in enumerate(said)]


def write_exam(folder: Path, scenes: list[Scene]) -> list[dict]:
    """A picture, a question and the right answer in each row."""
    exam = []
    for i, scene in enumerate(scenes):
        picture = f"pictures/held-out-{i}.png"
        draw(scene, SIDE).save(folder / picture)
        for question, answer in questions(scene):
            exam.append({"scene": i, "picture": picture, "question": question, "answer": answer})
    return exam


def write_start(folder: Path, scenes: list[Scene], seed: int) -> None:
    """A LLaVA's folder: a tokenizer of the world's words, an image processor, random weights."""
    texts = [f"Q: {question} A: {answer}" for scene in scenes for question, answer in questions(scene)]
    pieces = BytesIO()
    settings = dict(model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=pieces, **settings)
    image_token = sentencepiece.SentencePieceProcessor(model_proto=pieces.getvalue()).get_piece_size()
    config = MODEL | {"image_token_index": image_token}
    config["text_config"] = MODEL["text_config"] | {"vocab_size": image_token + 1}
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "added_tokens_decoder": {str(image_token): {"content": "<image>", "special": True}},
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": SIDE},
            "crop_size": {"height": SIDE, "width": SIDE},
        },
    }
    model, generator = build_model(config).to_empty(device="cpu"), torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():  # where a patch lies matters as much as what is in it
        model.vision_tower.embeddings.position_embedding.weight.normal_(0.0, 0.3, generator=generator)
    with atomic_folder(folder) as target:
        save_model(target, model, config=config, source=folder, chat_template=CHAT_TEMPLATE)
        (target / "tokenizer.model").write_bytes(pieces.getvalue())
        for name, content in files.items():
            (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The exam


def examine(folder: Path, exam: list[dict], pictures: list[Path]) -> list[str]:
    """What a model answers to the exam's questions, greedily, when it is shown these pictures."""
    config = read_config(folder)
    model, tokenizer = build_model(config), load_tokenizer(folder)
    load_weights(model, WeightFiles(folder), device=torch.device("cpu"), dtype=torch.float32)
    template, processor = load_chat_template(folder, tokenizer), load_image_processor(folder, config)
    answers = []
    for start in range(0, len(exam), 90):
        shown, prompts = pictures[start : start + 90], []
        for row, picture in zip(exam[start : start + 90], shown, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            text = template.render([{"role": "user", "content": content}], add_generation_prompt=True)
            prompt = tokenizer.encode_prompt(text)
            prompts.append(processor.expand(prompt, [picture], lambda _: (SIDE, SIDE), tokenizer)[0])
        pixels = torch.cat([load_image(picture, processor) for picture in shown])
        sizes = dict(image_token=processor.token_id, tokens_per_image=processor.tokens)
        images = place_images(prompts, pixels, **sizes)
        completions = generate(model, prompts, max_new_tokens=24, stop_ids={tokenizer.eos_id}, images=images)
        answers += [tokenizer.decode(completion).strip() for completion in completions]
    return answers


def report(cfg: Config, exam: list[dict], scenes: list[Scene], results: dict[str, dict]) -> str:
    """The table and where to look next; all answers go to answers.jsonl, some to answers.png."""
    said = {title: result["answers"] for title, result in results.items()}
    rows = [row | dict(zip(said, answers, strict=True)) for row, *answers in zip(exam, *said.values(), strict=True)]
    write_rows(cfg.output / "answers.jsonl", rows)
    kinds = {"color": "What color", "shape": "What shape", "number": "How many", "place": "Where", "all": DESCRIBE}
    lines = [f"{len(rows)} questions about {len(scenes)} pictures of combinations that no training picture shows:\n"]
    lines.append(f"{'':12}{'exact match':>11}" + "".join(f"{kind:>8}" for kind in kinds) + f"{'training':>11}")
    shares = []
    for title, result in results.items():
        right = {kind: [] for kind in kinds}
        for row in rows:
            (kind,) = (kind for kind, words in kinds.items() if row["question"].startswith(words))
            right[kind].append(row[title] == row["answer"])
        shares.append(sum(map(sum, right.values())) / len(rows))
        by_kind = "".join(f"{sum(found) / len(found):>8.0%}" for found in right.values())
        lines.append(f"{title:12}{shares[-1]:>11.1%}{by_kind}{result['seconds']:>9.0f} s")

    # The exam's first pictures that fit, whatever was answered: a question of each kind, and descriptions between.
    cards, first = [], 0
    for kind in ("color", "all", "number", "all", "place", "all"):
        groups = 2 if kind == "all" else 1
        fitting = [row for row in rows[first:] if row["question"].startswith(kinds[kind])]
        row = next((row for row in fitting if len(scenes[row["scene"]]) == groups), None)
        if row is None:  # a short exam
            break
        cards.append((scenes[row["scene"]], row))
        first = next((i for i, later in enumerate(rows) if later["scene"] > row["scene"]), len(rows))
    caption = f"eyes shut {shares[0]:.1%} right, eyes open {shares[-1]:.1%}"
    draw_answers(cfg.output / "answers.png", cards, list(said), caption)
    folder = os.path.relpath(Path(__file__).parent)
    lines += [
        f"\nsee it        {cfg.output}/answers.png",
        f"all answers   {cfg.output}/answers.jsonl",
        f"loss curve    {cfg.output}/open/loss.svg",
        f"how it works  {folder}/vlm_finetune.py: read it, copy it, change it",
        f"try it        python {folder}/generate.py --model {cfg.output}/open/model \\",
        f'                  --image {cfg.output}/{rows[0]["picture"]} --prompt "{rows[0]["question"]}"',
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
