"""Watch a model learn: two minutes on a laptop's CPU, nothing to download.

    python recipes/quickstart.py

A Llama of a million parameters has read a few thousand little stories (recipes/quickstart_base.py made it). Here it is
taught a job: an order in plain English becomes one line of JSON. It is asked before, after LoRA and after QLoRA, always
with orders that are not in the training data, and an answer counts only if every character is right.

The training itself is recipes/lora_finetune.py, called as its command line calls it.
"""

import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed

import torch
import tyro

from checkpointing.adapters import load_adapter
from checkpointing.atomic import atomic_write_text, discard, make_folder
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from checkpointing.run_folder import clear_errors
from data.tokenizers import load_tokenizer
from models import build_model
from modules.generation import generate
from modules.nf4 import quantize_nf4, storage_bytes
from recipes import lora_finetune

BASE = Path(__file__).resolve().parent / "assets" / "quickstart_base"

NAMES = """Ada Ali Amir Ana Anna Ben Carl Cora Dana Dora Ella Emil Emma Eric Eva Finn Gita Hana Hugo Ida Igor Ivan Jack
Jana Jane Jin Juan Kai Karl Kim Kofi Lara Lea Leo Lena Lily Lin Luis Mara Max Mei Mia Mina Nina Noah Nora Olga Omar
Otto Paul Pia Priya Raj Rosa Sam Sara Sofia Tara Theo Tim Tom Vera Yara Zoe""".split()
CITIES = """Accra Athens Bergen Berlin Bern Bogota Boston Cairo Cork Dakar Delhi Denver Dubai Dublin Geneva Ghent Graz
Hanoi Kyiv Kyoto Lagos Leeds Lima Lisbon London Lyon Madrid Manila Miami Milan Nairobi Nice Oslo Paris Porto Prague
Quito Riga Rome Seoul Split Tokyo Turin Vienna Warsaw Zurich""".split()
ITEMS = """apron bag ball basket bell belt bike blanket bottle bowl broom bucket button cap card chair clock coat cup
curtain desk drum fan flag frame glove hat helmet jacket jar kettle kite ladder lamp map mirror mug pan pen pillow plate
ribbon ring rope rug scarf shirt shovel sofa spoon stool table tent towel tray umbrella vase wallet""".split()
COLORS = "black blue brown gray green orange pink purple red silver white yellow".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()  # 2 to 12
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

ORDERS = (
    "{name} from {city} wants {number} {color} {item}s by {day}.",
    "Please send {number} {color} {item}s to {name} in {city} before {day}.",
    "Hi, this is {name}. I need {number} {item}s in {color}, delivered to {city} on {day}.",
    "By {day} we must bring {name} the {number} {color} {item}s; the address is in {city}.",
    "{city}, for {day}: {number} {item}s, {color}, ordered by {name}.",
    "Can you ship {number} {color} {item}s to {city} for {day}? Thanks, {name}",
)


@dataclass
class Config:
    output: Path = Path("runs/quickstart")
    """Folder for the data, both runs and the results; those of an earlier quickstart are replaced."""
    train_rows: int = 1200
    """Orders to learn from."""
    held_out_rows: int = 200
    """Orders to be examined with."""
    epochs: int = 4
    """Passes over the training orders."""
    seed: int = 0
    """Seed of the orders and of the training."""


def main(cfg: Config) -> None:
    torch.set_num_threads(min(4, torch.get_num_threads()))  # matrices this small only make more threads wait
    train_file, held_out_file = cfg.output / "orders.jsonl", cfg.output / "held_out.jsonl"
    if train_file.exists():
        for name in ("lora", "qlora"):
            discard(cfg.output / name)
    rows = make_orders(cfg.train_rows + cfg.held_out_rows, cfg.seed)
    held_out, train = rows[: cfg.held_out_rows], rows[cfg.held_out_rows :]
    make_folder(cfg.output)
    for path, part in ((train_file, train), (held_out_file, held_out)):
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in part))

    answers = {"before": answer(held_out)}
    seconds = {}
    for name, quantize in (("lora", "none"), ("qlora", "nf4")):
        say(f"\n{name}: recipes/lora_finetune.py --quantize {quantize}")
        started = time.perf_counter()
        lora_finetune.main(
            lora_finetune.Config(
                model=str(BASE),
                data=train_file,
                eval_data=held_out_file,
                output=cfg.output / name,
                quantize=quantize,
                epochs=cfg.epochs,
                batch_size=16,
                lr=4e-3,
                warmup_steps=10,
                eval_every=75,
                activations="none",
                device="cpu",
                seed=cfg.seed,
            )
        )
        seconds[name] = time.perf_counter() - started
        answers[name] = answer(held_out, cfg.output / name / "adapter", quantize)
    print(answers, seconds)


def make_orders(count: int, seed: int) -> list[dict[str, str]]:
    """Different orders as prompt/completion rows, the same ones for the same seed."""
    rng, orders = random.Random(seed), {}
    while len(orders) < count:
        name, city, item, color, day = (rng.choice(words) for words in (NAMES, CITIES, ITEMS, COLORS, DAYS))
        number = rng.randrange(len(NUMBERS))
        prompt = rng.choice(ORDERS).format(
            name=name, city=city, item=item, color=color, number=NUMBERS[number], day=day
        )
        order = {"name": name, "city": city, "item": item, "color": color, "count": number + 2, "day": day[:3]}
        orders[prompt] = " " + json.dumps(order)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in orders.items()]


def answer(rows: list[dict[str, str]], adapter: Path | None = None, quantize: str = "none") -> list[str]:
    """What the model writes behind each prompt, greedily."""
    model, tokenizer = build_model(read_config(BASE)), load_tokenizer(BASE)
    if quantize == "nf4":
        quantize_nf4(model)
    load_weights(model, WeightFiles(BASE), device=torch.device("cpu"), dtype=torch.float32)
    if adapter:
        load_adapter(model, adapter)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    completions = generate(model, prompts, max_new_tokens=64, stop_ids={tokenizer.eos_id})
    return [tokenizer.decode(completion) for completion in completions]


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
