"""Evaluation loss, and a sample of what the model writes, without keeping any logits."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from modules.generation import generate
from modules.loss import IGNORE_INDEX, linear_cross_entropy


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    batches: Iterable,
    device: torch.device,
    dtype: torch.dtype,
    loss_fn: Callable[..., Tensor] = linear_cross_entropy,
) -> tuple[float, int]:
    """Mean loss per target token over all batches, and the number of those tokens.

    `loss_fn(hidden, model, targets, index=...)` returns the sum over a batch, as `linear_cross_entropy` does.
    """
    training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        batch = batch.to(device, dtype)
        images = {} if batch.images is None else {"images": batch.images}
        hidden = model(batch.input_ids, batch.layout, **images)
        total += loss_fn(hidden, model, batch.targets, index=batch.target_index)
        tokens += batch.target_tokens
    model.train(training)
    return (total / tokens).item(), tokens


def sample_completion(
    model: nn.Module, dataset, tokenizer, stop_ids: set[int], max_new_tokens: int = 64
) -> dict[str, str]:
    """Greedy completion of the first row: its `prompt` (up to the first target), `completion` and `expected`."""
    virtual = dataset.report.virtual_tokens  # `generate` puts them in front itself
    input_ids, targets = (tensor[virtual:].tolist() for tensor in dataset[0])
    first = next(i for i, target in enumerate(targets) if target != IGNORE_INDEX)
    if first == 0:  # a text row: everything is a target, so continue its beginning
        first = min(len(input_ids) // 2, 31)
        image_token = dataset.images and dataset.images.processor.token_id
        while input_ids[first + 1] == image_token:  # an image is never cut
            first += 1
    prompt, expected = input_ids[: first + 1], [t for t in targets[first:] if t != IGNORE_INDEX]
    images = dataset.place_images(0, prompt)
    (completion,) = generate(model, [prompt], max_new_tokens=max_new_tokens, stop_ids=stop_ids, images=images)
    texts = {"prompt": prompt, "completion": completion, "expected": expected}
    return {name: tokenizer.decode(ids) for name, ids in texts.items()}
