"""Prompt tuning: a few trained vectors in front of the text, and nothing else (arXiv:2104.08691, Sec. 2).

    [P; X]          P [n, D], trained; X [T, D], the text's embeddings

The frozen model reads P like n words (the paper's Pr(Y | [P; X])). These are n · D numbers: 82 thousand for 20 virtual
tokens in Llama 3 8B. An adapter of this size can be sent along with a request, and one batch can mix tasks. It learns
slowly and needs a large model: in the paper it reaches full fine-tuning at 11B parameters and stays behind below
(Sec. 3.1). Learning rates are high: the paper's is 0.3 (Adafactor), the quickstart's model likes 0.1 (AdamW). Each
virtual token costs a token of compute and of cache, for good.

`--prompt-init` says how P begins (Sec. 3.2):

    vocabulary      embeddings of tokens drawn from the 5,000 first, which are the most frequent; the default
    text            those of --prompt-text: training starts at that prompt. By default n is the number of its tokens
    random          normal, of the embeddings' own spread. (PEFT's random start is N(0, 1), fifty times as large)
"""

import torch
from torch import Tensor, nn

from modules.adapters.options import Options
from modules.adapters.virtual_tokens import (
    FREQUENT,
    KEY,
    Table,
    add_embedding,
    check_start,
    config_of,
    load_prompt,
    start_ids,
)

PEFT_TYPE = "PROMPT_TUNING"
VIRTUAL_TOKENS = True
READS = ("num_virtual_tokens", "prompt_init", "prompt_text")

check = check_start
load = load_prompt


@torch.no_grad()
def add(model: nn.Module, options: Options) -> list[str]:
    ids, embedding = start_ids(model, options), model.model.embed_tokens
    if ids is None:
        spread = embedding.weight[:FREQUENT].float().std().item()
        rows = torch.randn(options.num_virtual_tokens, embedding.embedding_dim) * spread
    else:
        rows = embedding(torch.tensor(ids, device=embedding.weight.device))
    return add_embedding(model, len(rows), Table(rows, options.dtype))


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    config = config_of(model, PEFT_TYPE) | {"prompt_tuning_init": "RANDOM"}  # PEFT then needs no tokenizer
    return config, {KEY: model.model.embed_tokens.prompt().detach()}
