"""OLoRA: LoRA that begins with an orthonormal basis of the weight (arXiv:2406.01775).

With W = Q R, Q [out, in] of orthonormal columns, R [in, in] upper triangular, and [:r] for the first r (Alg. 1):

    B = Q[:r]  [out, r]        A = R[:r]  [r, in]        W_res = W - s · B A  is frozen        s = α/r
    y = W_res x + s · B A x    at the start: W x, up to rounding

The same idea as PiSSA (pissa.py), with a QR instead of an SVD: several times cheaper, orthonormal B, but
which directions are trained depends on the order of W's columns, not on their weight. Shapes and parameter count are
LoRA's. Use it where PiSSA's start takes too long. It is saved like PiSSA, as a plain LoRA of rank 2 r.
"""

from functools import partial

import torch
from torch import Tensor

from modules.adapters.methods import pissa

NEEDS_DENSE = True


class OLoRALinear(pissa.PiSSALinear):
    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(W)
        return R[: self.rank], Q[:, : self.rank]


add = partial(pissa.add, layer=OLoRALinear)
export = pissa.export
opens = partial(pissa.opens, start="olora")
load = partial(pissa.load, layer=OLoRALinear)
