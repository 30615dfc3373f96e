"""New special tokens: the tokenizer that knows them, and its files, for whoever opens the result."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data.json_rows import read_json
from data.tokenizers.added_tokens import AddedToken
from data.tokenizers.load import Tokenizer, load_tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES += ("vocab.json", "merges.txt")


def read_tokens(arguments: Sequence[str]) -> list[str]:
    """The tokens of a command line: themselves, or one file with one per line. Raises ValueError for bad ones."""
    tokens = list(arguments)
    if len(tokens) == 1 and Path(tokens[0]).is_file():
        tokens = [line for line in Path(tokens[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    if bad := [token for token in tokens if not token or token != token.strip() or tokens.count(token) > 1]:
        raise ValueError(f"--new-tokens {bad[0]!r}: a token is given once, and has no white space around it")
    return tokens


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], embeddings: int) -> tuple[Tokenizer, list[int]]:
    """A tokenizer that finds `tokens` in any text, as special ones, and the rows that are new to the model.

    A token that the vocabulary has keeps its id; others get the next ones, as in transformers. The rows are theirs, and
    any others that a model with this many embeddings lacks.
    """
    if not tokens:
        return tokenizer, []
    known = dict(tokenizer.added)
    for token in tokens:
        if token not in known:
            free = max(tokenizer.vocab_size, *(t.id + 1 for t in known.values()), 0)
            known[token] = AddedToken(token, tokenizer.model.vocab.get(token, free))
    longer = Tokenizer(tokenizer.model, tokenizer.decoder, list(known.values()))
    for name in ("bos_id", "eos_id", "pad_id", "adds_bos", "adds_eos"):
        setattr(longer, name, getattr(tokenizer, name))
    return longer, sorted({*(known[token].id for token in tokens), *range(embeddings, longer.vocab_size)})


def tokenizer_folder(folder: Path, adapter: Path | None) -> Path:
    """The checkpoint's folder, or the adapter's where that has a tokenizer with tokens that the checkpoint's lacks."""
    if adapter and any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        if load_tokenizer(adapter).added.keys() - load_tokenizer(folder).added.keys():
            return adapter
    return folder


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, source: Path) -> None:
    """Write the files of `source`'s tokenizer to `folder`, with the tokens that `tokenizer` has beyond them.

    Raises ValueError if what was written is not this tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(source, folder)
    config = read_json(folder / "tokenizer_config.json")
    for name in ("bos", "eos", "pad"):  # some folders name them in their generation config, which stays behind
        token = tokenizer.token_of(getattr(tokenizer, f"{name}_id"))
        if token is not None:
            config.setdefault(f"{name}_token", token)
    if (folder / "tokenizer.json").is_file():
        spec = read_json(folder / "tokenizer.json")
        there = {token["content"] for token in spec.setdefault("added_tokens", [])}
        new = [token for content, token in tokenizer.added.items() if content not in there]
        spec["added_tokens"] += map(asdict, new)
        _write_json(folder / "tokenizer.json", spec)
        listed = config.get("added_tokens_decoder")
    else:  # then the config lists them all
        listed = config["added_tokens_decoder"] = {}
        new = list(tokenizer.added.values())
        config["add_bos_token"], config["add_eos_token"] = tokenizer.adds_bos, tokenizer.adds_eos
    if listed is not None:
        for token in new:
            fields = asdict(token)
            listed[str(fields.pop("id"))] = fields
    _write_json(folder / "tokenizer_config.json", config)
    written = load_tokenizer(folder)
    for name in ("added", "bos_id", "eos_id", "adds_bos", "adds_eos", "vocab_size"):
        if getattr(written, name) != getattr(tokenizer, name):
            raise ValueError(f"{source}: its tokenizer cannot be saved with new tokens ({name} changes)")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
