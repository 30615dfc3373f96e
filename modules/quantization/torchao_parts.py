"""What is taken from torchao: the NF4 tensor and 8-bit AdamW. The only file that imports it, 0.17 or 0.18."""

import importlib.metadata
import logging
import os

# All of this is plain Python: torchao's compiled kernels, and its warnings about them, are not needed.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

try:
    from torchao.optim import AdamW8bit
    from torchao.optim.adam import single_param_adam

    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor, SubclassTensorArgs  # 0.18
    except ImportError:
        from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs  # 0.17
except ImportError as error:
    try:
        found = f"torchao {importlib.metadata.version('torchao')}"
    except importlib.metadata.PackageNotFoundError:
        found = "no torchao"
    fix = "pip install 'torchao>=0.17,<0.19'"
    raise ImportError(f"NF4 and 8-bit AdamW need torchao 0.17 or 0.18, found {found}: {fix}") from error

__all__ = ["AdamW8bit", "NF4Tensor", "SubclassTensorArgs", "single_param_adam"]
