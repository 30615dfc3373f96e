"""Parallel adapters: a bottleneck next to the feed-forward (arXiv:2110.04366, Sec. 3.3 and Table 1).

    y = x' + feed_forward(n) + s · (W_up relu(W_down n + b_down) + b_up)        n = norm(x'),  s = α/r

The adapter (bottleneck.py) reads what the feed-forward reads, and their outputs add up: it is a second, small
feed-forward with weights of its own, and LoRA's form of update (α/r) · B A n with a ReLU between A and B. In the
paper's comparison this place beats the one behind a sub-layer (Houlsby, Pfeiffer), and the feed-forward makes better
use of a large bottleneck than attention does.

2 r D + r + D numbers per block, 4.3 million in Llama 3 8B for r = 16. The scale matters here as in LoRA: the paper
tunes s and uses 4, which is `--alpha` four times `--rank`. Not mergeable, but it need not wait for the feed-forward.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from modules.adapters import bottleneck
from modules.adapters.options import Options
from modules.adapters.parts import adopt, adopted
from modules.feed_forward import FeedForward

READS = ("rank", "alpha", "dropout", "targets")


class ParallelFeedForward(FeedForward):
    """feed_forward(x) + adapter(x), the former frozen, with its layers under their own names."""

    replaces, targets, peft_type = FeedForward, ("mlp",), "PARALLEL_ADAPTER"

    def __init__(self, base: FeedForward, options: Options):
        adopt(self, base)
        self.requires_grad_(False)
        dim, device = base.gate_proj.in_features, base.gate_proj.weight.device
        scale = options.alpha / options.rank
        self.adapter = bottleneck.Bottleneck(dim, options, F.relu, scale=scale, device=device)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x)

    def base_layer(self) -> FeedForward:
        return adopted(self, FeedForward, without="adapter")


add = partial(bottleneck.add, layer=ParallelFeedForward)
export = partial(bottleneck.export, layer=ParallelFeedForward)
PEFT_TYPE = ParallelFeedForward.peft_type
load = partial(bottleneck.load, layer=ParallelFeedForward)
