"""Houlsby adapters: a bottleneck behind attention and one behind the feed-forward (arXiv:1902.00751, Sec. 2.1).

    x' = x + A(attention(norm(x)))        y = x' + A'(feed_forward(norm(x')))        A(h) = h + adapter(h)

with adapter(h) = W_up gelu(W_down h + b_down) + b_up (bottleneck.py) and GELU as in the authors' code. A has a
skip connection of its own and starts as the identity. As the sub-layers end in the linear layers o_proj and down_proj,
the adapters stand behind these.

The first method of this family, and the one with the most adapters: 2 (2 r D + r + D) numbers per block, 8.7 million
in Llama 3 8B for r = 16. It trains well at small sizes and never merges: every generated token passes four small
products more per block. The paper also trains the norms; here they stay frozen.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import bottleneck
from modules.adapters.options import Options
from modules.adapters.parts import FrozenLinear

READS = ("rank", "dropout", "targets")


class HoulsbyLinear(FrozenLinear):
    """y + adapter(y) with y = W x, W frozen."""

    replaces, targets, peft_type = nn.Linear, ("self_attn.o_proj", "mlp.down_proj"), "HOULSBY"
    activation = staticmethod(F.gelu)

    def __init__(self, base: nn.Linear, options: Options):
        super().__init__(base)
        device = base.weight.device
        self.adapter = bottleneck.Bottleneck(base.out_features, options, self.activation, device=device)
        self.adapter.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        return y + self.adapter(y)


add = partial(bottleneck.add, layer=HoulsbyLinear)
export = partial(bottleneck.export, layer=HoulsbyLinear)
PEFT_TYPE = HoulsbyLinear.peft_type
load = partial(bottleneck.load, layer=HoulsbyLinear)
