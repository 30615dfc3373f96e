"""A small byte-level tokenizer trained on the spot, for tests of what stands on a tokenizer."""

from functools import cache

import tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CORPUS = [
    "user assistant system answer question hello world, the model says: a b c d\n\n" * 20,
    "USER: hi there ASSISTANT: yes [INST] no [/INST] <think> </think> ### Response:\n" * 20,
]


@cache
def train() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


class TinyTokenizer:
    """The interface of data.tokenizers.load.Tokenizer over the `tokenizers` package."""

    def __init__(self, bos: str | None = "<s>", eos: str | None = "</s>", adds_bos: bool = True):
        self.bos, self.eos, self.adds_bos, self.adds_eos = bos, eos, adds_bos, False
        self.special_tokens = {token: train().token_to_id(token) for token in SPECIAL}
        self.control_tokens = dict(self.special_tokens)
        self.vocab_size = train().get_vocab_size()
        self.bos_id = self.special_tokens.get(bos)
        self.eos_id = self.special_tokens.get(eos)
        self.pad_id = None

    def encode(self, text):
        return train().encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text):
        ids = self.encode(text)
        return ids if not self.adds_bos or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def token_of(self, token_id):
        return train().id_to_token(token_id) if token_id is not None else None

    def encode_with_spans(self, text):
        encoding = train().encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids, skip_special_tokens=True):
        return train().decode(ids, skip_special_tokens=skip_special_tokens)

    def oracle(self, chat_template: str | None = None) -> PreTrainedTokenizerFast:
        """The same tokenizer in transformers."""
        return PreTrainedTokenizerFast(
            tokenizer_object=train(),
            bos_token=self.bos,
            eos_token=self.eos,
            chat_template=chat_template,
            clean_up_tokenization_spaces=False,
        )
