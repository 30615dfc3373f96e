"""Make recipes/assets/quickstart_base, the small Llama that recipes/quickstart.py teaches.

    pip install -e ".[test]" && python recipes/quickstart_base.py

Writes stories, notes and exercises with the words of the quickstart, its sentences among them but never its JSON,
trains a byte-level BPE on them, runs recipes/pretrain.py and keeps the result in bfloat16.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: Ctrl-C during the slow imports below then prints no traceback.
from checkpointing.errors import clear_errors  # isort: split

import torch
import tyro

from checkpointing.atomic import atomic_folder, atomic_write_text, discard, make_folder
from checkpointing.export import save_model
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from models import build_model
from recipes import pretrain
from recipes.quickstart import BASE, CITIES, COLORS, DAYS, ITEMS, NAMES, NUMBERS, SENTENCES, capital, write_rows

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
# A word, or all that stands between two: so a word is one token after a space as after a quotation mark, and a small
# model need not learn its copies one by one.
WORDS_AND_BETWEEN = r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


@dataclass
class Config:
    work: Path = Path("runs/quickstart_base")
    """Folder for the corpus and the pretraining run."""
    output: Path = BASE
    """Where the finished checkpoint goes."""
    documents: int = 120_000
    """Texts to write."""
    epochs: int = 1
    """Passes over them."""
    batch_size: int = 32
    """Packs of 192 tokens per step."""
    lr: float = 3e-3
    """Peak learning rate."""
    device: str = "auto"
    """auto, cpu, cuda …; two CPU cores take six minutes."""
    seed: int = 0
    """Seed of the texts and of the training."""


def main(cfg: Config) -> None:
    rng = Random(cfg.seed)
    texts = [document(rng) for _ in range(cfg.documents)]
    start = cfg.work / "start"
    make_folder(start)
    if (cfg.work / "corpus.jsonl").exists():
        discard(cfg.work / "run")  # an earlier one of ours
    write_rows(cfg.work / "corpus.jsonl", [{"text": text} for text in texts])
    write_tokenizer(start, texts)
    pretrain.main(
        pretrain.Config(
            model=str(start),
            data=cfg.work / "corpus.jsonl",
            output=cfg.work / "run",
            seq_len=192,
            epochs=cfg.epochs,
            batch_size=cfg.batch_size,
            lr=cfg.lr,
            warmup_steps=100,
            activations="none",
            compile=False,
            device=cfg.device,
            dtype="float32",
            save_every=1000,
            seed=cfg.seed,
        )
    )
    folder = cfg.work / "run" / "model"
    config = read_config(folder)
    model = build_model(config)
    load_weights(model, WeightFiles(folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    with atomic_folder(cfg.output) as target:
        save_model(target, model, config=config, source=folder)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """tokenizer.json, tokenizer_config.json and the model's configuration with the tokenizer's ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # extra: test

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_AND_BETWEEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end, pad = (tokenizer.token_to_id(token) for token in (BEGIN, END, PAD))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    settings = {
        "config.json": MODEL | ids,
        "generation_config.json": ids,
        "tokenizer_config.json": names
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": MODEL["max_position_embeddings"],
        },
    }
    for name, content in settings.items():
        atomic_write_text(folder / name, json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The texts. Each kind exercises something that a model of real text has long learnt: to keep apart who has what, to
# find it again when asked, to say a number or a day in another way, to repeat.


@dataclass
class Person:
    name: str
    city: str
    item: str
    color: str
    count: int
    day: str

    @property
    def things(self) -> str:
        """red lamps"""
        return f"{self.color} {self.item}s"

    @property
    def number(self) -> str:
        return NUMBERS[self.count - 2]


def people(rng: Random, count: int) -> list[Person]:
    """Different names, cities, things, colours, numbers and days."""
    words = [rng.sample(list(source), count) for source in (NAMES, CITIES, ITEMS, COLORS, range(2, 13), DAYS)]
    return [Person(*fields) for fields in zip(*words, strict=True)]


def document(rng: Random) -> str:
    return rng.choices(list(KINDS), weights=KINDS.values())[0](rng)


STORY = (
    "{name} lives in {city}.",
    "{name} has {number} {color} {item}s.",
    "On {day} {name} bought {number} {item}s. They are {color}.",
    "{name} met a friend in {city} on {day}.",
    "There are {number} {color} {item}s at the house of {name}.",
    "Every {day} {name} travels to {city}.",
    "{name} went to the market in {city} and saw {number} {color} {item}s.",
    "It was {day}. {name} lost one {color} {item} and found {number} others.",
    "The {item}s of {name} are {color}. {name} keeps {number} of them in {city}.",
    "In {city} the shops open on {day}, so {name} went there for {number} {item}s.",
    "{name} painted {number} {item}s {color} and gave them away on {day}.",
)


def story(rng: Random) -> str:
    """Two people, a few sentences about each."""
    lines = [
        line.format(**vars(person), number=person.number)
        for person in people(rng, rng.choice((1, 2)))
        for line in rng.sample(STORY, rng.choice((1, 2, 2, 3)))
    ]
    return " ".join(lines)


QUESTIONS: tuple[tuple[str, Callable[[Person], object]], ...] = (
    ("Who is it about?", lambda p: p.name),
    ("Where was it?", lambda p: p.city),
    ("Where is {name}?", lambda p: p.city),
    ("What did {name} have?", lambda p: f"{p.number} {p.item}s"),
    ("What is one of them?", lambda p: f"one {p.item}"),
    ("Which color have the {item}s?", lambda p: p.color),
    ("How many {item}s?", lambda p: p.count),
    ("How many, in a word?", lambda p: p.number),
    ("When?", lambda p: p.day),
    ("When, in short?", lambda p: p.day[:3]),
)


def questions(rng: Random) -> str:
    """A sentence, and questions that it answers."""
    (person,) = people(rng, 1)
    fields = vars(person) | {"number": person.number}
    asked = [f"Q: {question.format(**fields)} A: {reply(person)}" for question, reply in rng.sample(QUESTIONS, 4)]
    return "\n".join([capital(rng.choice(SENTENCES).format(**fields)), *asked])


def note(rng: Random) -> str:
    """A sentence, and some of it as a record, in one of many notations."""
    (person,) = people(rng, 1)
    pairs = [
        (rng.choice(("who", "person", "owner")), person.name),
        (rng.choice(("where", "place", "town")), person.city),
        (rng.choice(("what", "thing", "object")), person.item),
        (rng.choice(("hue", "paint", "look")), person.color),
        (rng.choice(("number", "pieces", "total")), person.count),
        (rng.choice(("when", "date", "weekday")), person.day[:3]),
    ]
    pairs = rng.sample(pairs, rng.choice((2, 3, 4, 5, 6)))
    names = rng.sample(list(NOTATIONS), 2)
    telling = capital(rng.choice(SENTENCES).format(**vars(person), number=person.number))
    keys = ", ".join(key for key, _ in pairs)
    return "\n".join([telling, f"Note: {keys}", *(f"{name} {NOTATIONS[name](pairs)}" for name in names)])


NOTATIONS: dict[str, Callable[[list[tuple[str, object]]], str]] = {
    "record": lambda pairs: json.dumps(dict(pairs)),
    "list": lambda pairs: json.dumps([value for _, value in pairs]),
    "lines": lambda pairs: "; ".join(f"{key}: {value}" for key, value in pairs),
    "short": lambda pairs: " / ".join(f"{key}={value}" for key, value in pairs),
    "tags": lambda pairs: "".join(f"<{key}>{value}</{key}>" for key, value in pairs),
}


def drill(rng: Random) -> str:
    """Numbers, days and plurals in several spellings."""
    (p,) = people(rng, 1)
    return rng.choice(
        (
            f"one {p.item}, {p.number} {p.item}s. {p.count} {p.item}s.",
            f"{p.number} is {p.count}, {p.count} is {p.number}.",
            f"{p.day[:3]} is {p.day}, {p.day} is {p.day[:3]}.",
            f'"{p.item}s" are many, "{p.item}" is one.',
            f'"{p.number}" means "{p.count}", "{p.day}" means "{p.day[:3]}".',
        )
    )


WORDS = (
    [*NAMES, *CITIES],
    [*ITEMS, *(f"{item}s" for item in ITEMS)],
    [*COLORS, *NUMBERS, *DAYS, *(day[:3] for day in DAYS), *map(str, range(2, 13))],
    """about address ask be before bought brought bring by can city color count date day deliver delivered find for from
    get give go he her here him his home how I if in is item it less many more must name need no note now of on or
    order ordered other our please send she ship so some street take thanks that the their them then there they this to
    us want wants was we were what when where which who will with would yes you your Hi Please Can By Thanks""".split(),
)


def copying(rng: Random) -> str:
    """A list of words, said again, perhaps in another notation."""
    words = [rng.choice(rng.choice(WORDS)) for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 6)))]
    lists = (" ".join(words), json.dumps(words), f"({', '.join(words)})", f"<{'|'.join(words)}>")
    first, second = rng.choice(lists), rng.choice(lists)
    return f"{first}\nagain: {second}"


KINDS: dict[Callable[[Random], str], float] = {story: 1, questions: 4, note: 6, drill: 1, copying: 8}


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
