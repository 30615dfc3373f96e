"""Watch a model learn: a minute on a laptop's CPU, nothing to download.

    python recipes/quickstart.py

A Llama of a million weights has read stories and notes (recipes/quickstart_base.py made it). Here it is taught a job: a
sentence in plain English becomes one line of JSON. It is examined before, after LoRA and after QLoRA, with sentences
that are not in the training data, and an answer counts only if every character is right. The training is that of
recipes/lora_finetune.py, called with the settings that its command line takes.
"""

import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors  # isort: split

import torch
import tyro

from checkpointing.adapters import load_adapter
from checkpointing.atomic import atomic_write_text, claim_folder
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.tokenizers.load import load_tokenizer
from models import build_model
from modules.generation import generate
from modules.memory.plan import storage_bytes
from modules.quantization.nf4 import quantize_nf4
from recipes import lora_finetune

BASE = Path(__file__).resolve().parent / "assets" / "quickstart_base"

NAMES = """Ada Ali Anna Ben Carl Cora Dana Ella Emil Emma Eric Eva Finn Gita Hana Hugo Ida Igor Ivan Jack Jane Juan
Kai Kofi Lara Leo Lily Lin Luis Mara Max Mei Mia Nina Noah Nora Olga Omar Otto Paul Priya Raj Rosa Sam Sara Tom Vera
Zoe""".split()
CITIES = """Accra Athens Berlin Bogota Boston Cairo Cork Dakar Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London
Lyon Madrid Manila Milan Nairobi Oslo Paris Prague Riga Rome Seoul Tokyo Vienna Warsaw Zurich""".split()
ITEMS = """apron bag ball basket bell belt bike blanket bottle bowl bucket cap card chair clock coat cup curtain desk
drum fan flag hat jacket jar kettle kite lamp map mirror mug pen pillow plate ring rug shirt sofa spoon table tent towel
vase wallet""".split()
COLORS = "black blue brown gray green orange pink purple red silver white yellow".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()  # 2 to 12
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SENTENCES = (
    "{name} lives in {city} and has {number} {color} {item}s since {day}.",
    "On {day} {name} took the train to {city} with {number} {color} {item}s.",
    "In {city}, {name} sold {number} {item}s on {day}; all of them were {color}.",
    "The {number} {color} {item}s that {name} found in {city} were gone on {day}.",
    "{color}, that is how {name} likes the {number} {item}s bought on {day} in {city}.",
    "It rained in {city} on {day} and the {number} {item}s of {name} got wet, the {color} ones.",
)


@dataclass
class Config:
    output: Path = Path("runs/quickstart")
    """Folder for the rows, the two runs and the answers; an earlier quickstart there is replaced."""
    train_rows: int = 800
    """Rows to learn from."""
    held_out_rows: int = 200
    """Rows to be examined with."""
    epochs: int = 4
    """Passes over the training rows."""
    lr: float = 4e-3
    """Peak learning rate: small models like it high."""
    seed: int = 0
    """Seed of the rows and of the training."""


def main(cfg: Config) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain little from more, and one gives the same numbers on any CPU
    train_file, held_out_file = cfg.output / "train.jsonl", cfg.output / "held_out.jsonl"
    claim_folder(cfg.output, "quickstart.py", ("lora", "qlora"))
    rows = make_rows(cfg.train_rows + cfg.held_out_rows, cfg.seed)
    held_out, train = rows[: cfg.held_out_rows], rows[cfg.held_out_rows :]
    write_rows(train_file, train)
    write_rows(held_out_file, held_out)

    results = {"base model": examine(held_out)}
    for title, name, quantize in (("LoRA", "lora", "none"), ("QLoRA (NF4)", "qlora", "nf4")):
        print(f"\n{title}: recipes/lora_finetune.py --quantize {quantize}", file=sys.stderr)
        settings = lora_finetune.Config(
            model=str(BASE),
            data=train_file,
            eval_data=held_out_file,
            output=cfg.output / name,
            quantize=quantize,
            epochs=cfg.epochs,
            batch_size=16,
            lr=cfg.lr,
            warmup_steps=10,
            eval_every=50,
            activations="none",
            device="cpu",
            seed=cfg.seed,
        )
        training = time.perf_counter()
        lora_finetune.main(settings)
        seconds = time.perf_counter() - training
        results[title] = examine(held_out, cfg.output / name / "adapter", quantize) | {"seconds": seconds}
    print(report(cfg, held_out, results))
    print(f"\nThis took {time.perf_counter() - started:.0f} s in all.")


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Sentences and their JSON as prompt/completion rows, no two alike, the same ones for the same seed."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        name, city, item, color, day = (rng.choice(words) for words in (NAMES, CITIES, ITEMS, COLORS, DAYS))
        number = rng.choice(NUMBERS)
        words = dict(name=name, city=city, item=item, color=color, number=number, day=day)
        prompt = capital(rng.choice(SENTENCES).format(**words))
        facts = {"name": name, "city": city, "item": item, "color": color, "count": NUMBERS.index(number) + 2}
        rows[prompt] = " " + json.dumps(facts | {"day": day[:3]})
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def examine(rows: list[dict[str, str]], adapter: Path | None = None, quantize: str = "none") -> dict:
    """The model's greedy completions, how many are right, and the bytes that its weights take."""
    model, tokenizer = build_model(read_config(BASE)), load_tokenizer(BASE)
    if quantize == "nf4":
        quantize_nf4(model)
    load_weights(model, WeightFiles(BASE), device=torch.device("cpu"), dtype=torch.float32)
    size = sum(storage_bytes(parameter) for parameter in model.parameters())
    if adapter:
        load_adapter(model, adapter)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    completions = generate(model, prompts, max_new_tokens=64, stop_ids={tokenizer.eos_id})
    answers = [tokenizer.decode(completion) for completion in completions]
    right = sum(answer == row["completion"] for answer, row in zip(answers, rows, strict=True))
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    return {"answers": answers, "right": right, "base_bytes": size, "trained": trained, "seconds": 0.0}


def report(cfg: Config, rows: list[dict[str, str]], results: dict[str, dict]) -> str:
    """The table, one sentence with all answers to it, and where to look next; all answers go to answers.jsonl."""
    answers = [result["answers"] for result in results.values()]
    write_rows(
        cfg.output / "answers.jsonl",
        [row | dict(zip(results, said, strict=True)) for row, *said in zip(rows, *answers, strict=True)],
    )
    lines = [f"{len(rows)} sentences that were not in the training data, each to become one line of JSON:\n"]
    lines.append(f"{'':14}{'exact match':>11}{'trained weights':>18}{'frozen base':>14}{'training':>11}")
    for title, result in results.items():
        lines.append(
            f"{title:14}{result['right'] / len(rows):>11.1%}{result['trained']:>18,}"
            f"{result['base_bytes'] / 1e6:>11.1f} MB{result['seconds']:>9.0f} s"
        )
    lines.append(f"\n{'sentence':14}{rows[0]['prompt']}")
    for title, said in zip(results, answers, strict=True):
        lines.append(f"{title:14}{said[0].strip() or '(ends the text)'}")
    folder = os.path.relpath(Path(__file__).parent)
    lines += [
        f"\nloss curves   {cfg.output}/lora/loss.svg and {cfg.output}/qlora/loss.svg",
        f"all answers   {cfg.output}/answers.jsonl",
        f"how it works  {folder}/lora_finetune.py: read it, copy it, change it",
        f"try it        python {folder}/generate.py --raw --model {os.path.relpath(BASE)} \\",
        f'                  --adapter {cfg.output}/lora/adapter --prompt "{rows[0]["prompt"]}"',
    ]
    return "\n".join(lines)


def write_rows(path: Path, rows: list[dict]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
