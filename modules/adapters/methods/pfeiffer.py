"""Pfeiffer adapters: one bottleneck per block, behind the feed-forward (arXiv:2005.00247).

    x' = x + attention(norm(x))        y = x' + A(feed_forward(norm(x')))        A(h) = h + adapter(h)

with adapter(h) = W_up relu(W_down h + b_down) + b_up (bottleneck.py). It is Houlsby's design after a search
over where adapters may stand: the one behind attention adds little, so it is left out, which halves the cost or pays
for a larger r. 2 r D + r + D numbers per block, 4.3 million in Llama 3 8B for r = 16.

(In BERT, whose norms stand behind the sub-layers, the adapter reads the sum x' + feed_forward(x') after its norm, with
the feed-forward's output as its skip connection. Llama's norms stand before the sub-layers; reading the feed-forward's
output keeps the adapter's input free of the residual stream's few very large entries.)
"""

from functools import partial

import torch.nn.functional as F

from modules.adapters import bottleneck
from modules.adapters.methods.houlsby import READS, HoulsbyLinear  # noqa: F401


class PfeifferLinear(HoulsbyLinear):
    targets, peft_type = ("mlp.down_proj",), "PFEIFFER"
    activation = staticmethod(F.relu)


add = partial(bottleneck.add, layer=PfeifferLinear)
export = partial(bottleneck.export, layer=PfeifferLinear)
PEFT_TYPE = PfeifferLinear.peft_type
load = partial(bottleneck.load, layer=PfeifferLinear)
