"""Rotary position embedding (arXiv:2104.09864) and the four ways Llama checkpoints stretch it to longer texts.

The pair (x_i, x_{i+H/2}) of a head is rotated by the angle position · frequency_i ("rotate half", the layout of
Hugging Face checkpoints). The scaling types change the frequencies; `dynamic` does so with the length of the text.

B batch, T tokens, N heads, H head dim.
"""

import math

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def rope_parameters(config: dict) -> dict:
    """Read a config.json's rotary settings in either spelling into one dict with `rope_type` and `rope_theta`.

    transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`. ValueError for a bad type.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"rope type {rope['rope_type']!r} in config.json is not one of {', '.join(ROPE_TYPES)}")
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor in config.json is not supported: Llama rotates whole heads")
    if rope["rope_type"] in ("llama3", "yarn"):
        trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = trained or config.get("max_position_embeddings", 2048)
    required = ["factor"] if rope["rope_type"] in ("linear", "dynamic", "llama3") else []
    if rope["rope_type"] == "llama3":
        required += ["low_freq_factor", "high_freq_factor"]
    if missing := [key for key in required if rope.get(key) is None]:
        raise ValueError(f"rope type {rope['rope_type']!r} in config.json lacks {', '.join(missing)}")
    return rope


class RotaryEmbedding:
    """The table of angles. Not a module: it has no weights, and its frequencies follow from the config alone."""

    def __init__(self, head_dim: int, rope: dict, max_position_embeddings: int):
        self.head_dim = head_dim
        self.rope = rope
        self.max_position_embeddings = max_position_embeddings
        self.scale = _yarn_attention_factor(rope, max_position_embeddings) if rope["rope_type"] == "yarn" else 1.0
        self._frequencies: dict[tuple, Tensor] = {}  # (device, length class) -> [H/2]

    def __call__(self, positions_BT: Tensor, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, H] in `dtype`, computed in float32.

        `longest` (largest position + 1, known on the host) matters to `dynamic` only.
        """
        frequencies = self.frequencies(longest, positions_BT.device)
        angles_BTh = positions_BT[..., None].float() * frequencies
        angles_BTH = torch.cat((angles_BTh, angles_BTh), dim=-1)
        return (angles_BTH.cos() * self.scale).to(dtype), (angles_BTH.sin() * self.scale).to(dtype)

    def frequencies(self, longest: int, device: torch.device) -> Tensor:
        """Radians per position of each pair, [H/2] float32."""
        length = max(longest, self.max_position_embeddings) if self.rope["rope_type"] == "dynamic" else 0
        key = (device, length)
        if key not in self._frequencies:
            if length > self.max_position_embeddings:  # a growing text passes many lengths: keep the last one only
                self._frequencies = {k: v for k, v in self._frequencies.items() if k[1] <= self.max_position_embeddings}
            self._frequencies[key] = self._compute_frequencies(length).to(device)
        return self._frequencies[key]

    def _compute_frequencies(self, length: int) -> Tensor:
        rope, dim, theta = self.rope, self.head_dim, self.rope["rope_theta"]
        factor = rope.get("factor")
        if rope["rope_type"] == "dynamic":
            # NTK-aware: raise the base so that the lowest frequency just spans the longer text.
            theta *= (factor * length / self.max_position_embeddings - (factor - 1)) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        frequencies = 1.0 / theta**exponents
        if rope["rope_type"] == "linear":
            return frequencies / factor
        if rope["rope_type"] == "llama3":
            return _llama3(frequencies, rope)
        if rope["rope_type"] == "yarn":
            return _yarn(frequencies, rope, dim, self.max_position_embeddings)
        return frequencies


def apply_rotary(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Rotate every head's pairs (x_i, x_{i+H/2}) by their position's angles."""
    first, second = x_BNTH.chunk(2, dim=-1)
    rotated = x_BNTH * cos_BTH[:, None] + torch.cat((-second, first), dim=-1) * sin_BTH[:, None]
    return rotated.to(x_BNTH.dtype)  # under autocast x is narrower than the residual stream's cosines


def _llama3(frequencies: Tensor, rope: dict) -> Tensor:
    """Llama 3.1: divide slow frequencies by `factor`, keep fast ones, blend in between (by wavelength)."""
    trained = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = trained * frequencies / (2 * math.pi)  # full turns a pair makes over the trained length
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / rope["factor"] + blend * frequencies


def _yarn(frequencies: Tensor, rope: dict, dim: int, max_positions: int) -> Tensor:
    """YaRN (arXiv:2309.00071, Sec. 3.2): interpolate pairs that turn seldom, keep those that turn often."""
    trained = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_positions / trained

    def pair_that_turns(times: float) -> float:
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * interpolated + frequencies * (1 - interpolated)


def _yarn_attention_factor(rope: dict, max_positions: int) -> float:
    """YaRN's temperature on the logits (Eq. 22), carried by cosines and sines."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    factor = rope.get("factor") or max_positions / rope["original_max_position_embeddings"]

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)
