"""Text generation with a key/value cache: greedy or sampled, for a batch of prompts of unequal length.

Prompts are padded on the *right*. A token's cache slot is its position, so a row's first new token overwrites its
first padding slot, and no row's numbers depend on how long the others are.

B batch, T tokens, D model, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from modules.adapters.virtual_tokens import virtual_ids
from modules.attention import SequenceLayout, padded_layout
from modules.image_tokens import Images


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    images: Images | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, up to and including the first of `stop_ids`; temperature 0 is greedy.

    `images` stand in the prompts (`place_images(prompts, ...)`). A model with virtual tokens
    (modules/adapters/virtual_tokens.py) gets them in front of every prompt. Raises ValueError for a prompt that is
    empty or too long for the model.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty and this tokenizer adds no BOS token: give at least one token")
    prompts = [[*virtual_ids(model), *prompt] for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    if longest >= model.config.max_length:
        raise ValueError(f"the prompt has {longest} tokens, this model takes {model.config.max_length - 1} at most")
    max_new_tokens = min(max_new_tokens, model.config.max_length - longest)

    training = model.training
    model.eval()
    weight = model.head.weight
    device, dtype = weight.device, weight.dtype
    B = len(prompts)
    tokens_BT = torch.zeros(B, longest + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    tokens_BT, lengths = tokens_BT.to(device), lengths.to(device)
    caches = model.make_caches(B, longest + max_new_tokens) if use_cache else None
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    rows = torch.arange(B, device=device)
    pictures = {} if images is None else {"images": images.prepare(device, dtype)}

    for new in range(max_new_tokens):
        if caches is None or new == 0:
            end = longest + new
            hidden_BTD = model(tokens_BT[:, :end], padded_layout(end).prepare(device, dtype), caches, **pictures)
            hidden_BD = hidden_BTD[rows, lengths - 1]
        else:
            layout = SequenceLayout(positions=(lengths - 1)[:, None], longest=longest + new)
            hidden_BD = model(tokens_BT[rows, lengths - 1][:, None], layout, caches)[:, 0]
        next_B = _choose(model.logits(hidden_BD).float(), temperature, generator)
        tokens_BT[rows, lengths] = next_B
        lengths = lengths + 1
        finished |= torch.isin(next_B, stops)
        if bool(finished.all()):
            break
    model.train(training)

    completions = []
    for prompt, row, end in zip(prompts, tokens_BT.tolist(), lengths.tolist(), strict=True):
        completion = row[len(prompt) : end]
        stop = next((i for i, token in enumerate(completion) if token in stop_ids), len(completion) - 1)
        completions.append(completion[: stop + 1])
    return completions


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature <= 0:
        return logits_BV.argmax(-1)
    probabilities_BV = torch.softmax(logits_BV / temperature, dim=-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(1)
