"""Tokenizers from what a checkpoint's folder holds, equal to the reference implementations to the last id.

    tokenizer = load_tokenizer("path/to/checkpoint")
    tokenizer.encode("Hello<|eot_id|>")        # special tokens written out in the text become special ids

Where the ids come from, in this order:

    in the folder                          read by                                    equal to
    tokenizer.json, byte-level BPE         byte_level_bpe.ByteLevelBPE (tiktoken)     `tokenizers`
    tokenizer.json, BPE with "▁"           sentencepiece_bpe.MetaspaceBPE             `tokenizers`
    tokenizer.model, tiktoken's ranks      byte_level_bpe.ByteLevelBPE (tiktoken)     tiktoken with Llama 3's pattern
    tokenizer.model, SentencePiece         sentencepiece_bpe.SentencePieceModel       `sentencepiece`

Each file is followed to the letter. transformers 5 does not always do so. For some classes (LlamaTokenizer,
GPT2Tokenizer) it takes only the vocabulary and the rules from a tokenizer.json and rebuilds the rest. From a
SentencePiece model it takes the pieces but not their scores, which changes how runs of spaces are split.
"""

import json
import re
from pathlib import Path

from data.json_rows import read_json
from data.tokenizers import byte_level_bpe, sentencepiece_bpe
from data.tokenizers.added_tokens import NAMED, AddedToken, Finder, content_of, with_tokens_of_config
from data.tokenizers.bpe import Span, check_decoder, join_tokens

# Llama 3.1's 256 special tokens follow its 128,000 ranks; the rest are <|reserved_special_token_3|> and up.
LLAMA3_SPECIAL = """<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|>
<|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>
<|python_tag|>""".split()
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]


class Tokenizer:
    """Text to ids and back. Build one with `load_tokenizer`.

    vocab_size       highest id + 1
    special_tokens   every token recognised in text, name to id; control_tokens: those of them that are special
    bos_id, eos_id, pad_id    None where the folder names none
    adds_bos, adds_eos        whether the checkpoint's tokenizer puts them around a text by itself
    """

    def __init__(
        self,
        model: byte_level_bpe.ByteLevelBPE | sentencepiece_bpe.MetaspaceBPE | sentencepiece_bpe.SentencePieceModel,
        decoder: dict | None,
        added: list[AddedToken],
    ):
        self.model, self.decoder = model, decoder
        self.added = {token.content: token for token in added}
        self.special_tokens = {token.content: token.id for token in added}
        self.control_tokens = {token.content: token.id for token in added if token.special}
        self.token_of_id = {i: token for token, i in model.vocab.items()}
        self.token_of_id |= {t.id: model.normalize(t.content)[0] if t.normalized else t.content for t in added}
        self.vocab_size = max(self.token_of_id) + 1
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.pad_id: int | None = None
        self.adds_bos = self.adds_eos = False
        self._literal = Finder({token.content: token for token in added if not token.normalized})
        self._normalized = Finder({model.normalize(t.content)[0]: t for t in added if t.normalized})
        self._control_ids = set(self.control_tokens.values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS or EOS. Raises ValueError for text that is not Unicode (a lone surrogate)."""
        return self._encode(text, want_spans=False)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """The same ids and for each the characters [start, end) of `text` that it covers, its leading space included.

        Tokens that share a character, each with some of its bytes, all cover it. The space or "▁" that some
        tokenizers put before a text counts as part of its first character.
        """
        return self._encode(text, want_spans=True)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the beginning of a text: with BOS if this tokenizer adds one and the text does not start with it."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids without a token, which a padded embedding has, are left out; bytes that are not UTF-8
        become �."""
        skipped = self._control_ids if skip_special_tokens else ()
        tokens = [self.token_of_id[i] for i in map(int, ids) if i in self.token_of_id and i not in skipped]
        return join_tokens(tokens, self.decoder)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary ("Ġworld", "▁world", "</s>"), or None."""
        return self.special_tokens.get(token, self.model.vocab.get(token))

    def token_of(self, token_id: int) -> str | None:
        """The name of an id in the vocabulary, or None."""
        return self.token_of_id.get(token_id)

    def _encode(self, text: str, want_spans: bool) -> tuple[list[int], list[Span]]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} of the text is a lone surrogate: it is not Unicode") from None
        ids: list[int] = []
        spans: list[Span] = []
        for start, stop, token in self._literal.split(text):
            if token is not None:
                ids.append(token.id)
                spans.append((start, stop))
                continue
            stretch, origin = self.model.normalize(text[start:stop])
            for first, last, token in self._normalized.split(stretch):
                if token is not None:
                    new, places = [token.id], [(first, last)]
                else:
                    new, places = self.model.encode(stretch[first:last], start + first == 0, want_spans)
                    places = [(a + first, b + first) for a, b in places] if first else places
                ids += new
                if want_spans:
                    if origin is not None:
                        places = [(origin[a][0], origin[b - 1][1]) for a, b in places]
                    spans += [(a + start, b + start) for a, b in places]
        return ids, spans if want_spans else []


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder.

    Raises FileNotFoundError if there is none and ValueError, naming the file, for one of an unknown kind.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # before 2023-08 the tokens' names stood in a file of their own
        config = config | read_json(folder / "special_tokens_map.json")
    around: tuple[list[int], list[int]] | None = None  # the special ids before and behind a text
    if (folder / "tokenizer.json").is_file():
        model, decoder, added, around = _from_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        model, decoder, added = _from_model_file(folder / "tokenizer.model", config)
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model; "
            "copy them there from the checkpoint it was made from"
        )
    names = {name: content_of(config.get(name)) or _default_name(name, config, model) for name in NAMED}
    tokenizer = Tokenizer(model, decoder, with_tokens_of_config(added, model.vocab, folder, config, names))

    generation = read_json(folder / "config.json") | read_json(folder / "generation_config.json")
    for name in ("bos", "eos", "pad"):
        token = names[f"{name}_token"]
        last_resort = generation.get(f"{name}_token_id") if f"{name}_token" not in config else None
        last_resort = last_resort[0] if isinstance(last_resort, list) else last_resort
        setattr(tokenizer, f"{name}_id", tokenizer.id_of(token) if token is not None else last_resort)

    if around is not None:
        before, after = around
        if before:
            tokenizer.bos_id = before[0]
        tokenizer.adds_bos, tokenizer.adds_eos = bool(before), bool(after)
        if len(before) > 1 or after not in ([], [tokenizer.eos_id]):
            raise ValueError(
                f"{folder / 'tokenizer.json'} puts the ids {before} before a text and {after} behind it; "
                f"supported are one BOS and the EOS ({tokenizer.eos_id})"
            )
    else:
        # transformers 5 adds a BOS only where tokenizer_config.json says so. As Meta published them, though, neither
        # Llama 2's nor Llama 3's tokenizer.model has such a file, and both begin every text with BOS.
        has_config = (folder / "tokenizer_config.json").is_file()
        as_published = isinstance(model, byte_level_bpe.ByteLevelBPE) or not has_config
        tokenizer.adds_bos = tokenizer.bos_id is not None and bool(config.get("add_bos_token", as_published))
        tokenizer.adds_eos = tokenizer.eos_id is not None and bool(config.get("add_eos_token", False))
    return tokenizer


def _from_json(path: Path) -> tuple:
    """(model, decoder, added tokens, special ids around a text) of a tokenizer.json."""
    spec = read_json(path)
    model = spec.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise ValueError(f"{path} holds a tokenizer of type {kind}; only BPE (Llama, Qwen, GPT-2 …) is supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{path}: BPE with {key} = {model[key]!r} is not supported")
    check_decoder(spec.get("decoder"), str(path))
    is_byte_level = '"ByteLevel"' in json.dumps(spec.get("pre_tokenizer"))
    kind = byte_level_bpe if is_byte_level else sentencepiece_bpe
    added = []
    for token in spec.get("added_tokens", []):
        fields = {key: token[key] for key in AddedToken.__dataclass_fields__ if key in token}
        added.append(AddedToken(**fields | {"id": model["vocab"].get(token["content"], token["id"])}))
    return kind.from_json(spec, str(path)), spec.get("decoder"), added, _template(spec.get("post_processor"), path)


def _from_model_file(path: Path, config: dict) -> tuple:
    """(model, decoder, added tokens) of a tokenizer.model: tiktoken's ranks, which are text, or SentencePiece's."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", path.read_bytes()[:1000]):
        model = byte_level_bpe.from_rank_file(path)
        first = max(model.vocab.values()) + 1
        added = [AddedToken(token, first + i) for i, token in enumerate(LLAMA3_SPECIAL)]
        return model, {"type": "ByteLevel"}, [] if config.get("added_tokens_decoder") else added
    # Does a "▁" go before the text behind a special token, too? transformers 5 says no unless `legacy`. Meta's own code
    # encodes each part of a chat by itself and so says yes, which is what a folder without a declared class gets.
    is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    prepend = "always" if config.get("legacy", not is_llama) else "first"
    if config.get("add_prefix_space") is False:
        prepend = "never"
    model = sentencepiece_bpe.SentencePieceModel(path, prepend)
    return model, model.decoder, [AddedToken(token, model.vocab[token]) for token in model.control_tokens]


def _template(post_processor: dict | None, path: Path) -> tuple[list[int], list[int]]:
    """The ids that the post_processor section of a tokenizer.json puts before and behind a text."""
    before: list[int] = []
    after: list[int] = []
    for step in (post_processor or {"processors": []}).get("processors", [post_processor]):
        if step["type"] == "TemplateProcessing":
            side = before
            for item in step["single"]:
                if "Sequence" in item:
                    side = after
                else:
                    side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":  # ByteLevel only trims offsets
            raise ValueError(f"{path}: post_processor {step['type']} is not supported (supported: TemplateProcessing)")
    return before, after


def _default_name(name: str, config: dict, model: object) -> str | None:
    """What a token is called that tokenizer_config.json does not mention."""
    if name in config and config[name] is None:
        return None
    if isinstance(model, sentencepiece_bpe.SentencePieceModel):
        return model.names.get(name)
    names = {}
    if isinstance(model, byte_level_bpe.ByteLevelBPE) and model.is_rank_file:
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    elif str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return names.get(name)
