"""Causal self-attention with grouped key/value heads, and the one place that picks the kernel for it.

A `SequenceLayout`, made once on the CPU, describes a batch (positions, document borders) for every layer, so nothing in
a step has to ask the GPU how long a row is.

    padded rows    plain causal attention. Padding stands on the right, so no real token ever sees it: no mask needed.
    packed rows    documents end to end must not see each other: variable-length flash attention on CUDA in half
                   precision, a block-diagonal mask elsewhere.
    windows        a token sees the last `window` tokens only: variable-length flash attention, or a mask.
    generation     a key/value cache with one write position per row.

Who sees whom is said in one place, `SequenceLayout.sees`: masks and the cache ask it, and the kernels that do without
a mask run only where they compute the same. Scores are scaled and softmaxed in `_causal`, `_masked` and `_varlen`.

B batch, T tokens, D model, N query heads, K key/value heads, H head dim, S cache slots.
"""

import inspect
import time
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from modules.rotary_embedding import apply_rotary

# From torch 2.12 on varlen_attn shares key/value heads between query heads; before, they must be repeated.
_VARLEN_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class SequenceLayout:
    """Where every token stands and which tokens it may see. Made by `padded_layout` or `packed_layout`."""

    positions: Tensor  # [B, T] int64; [1, T] where all rows count alike
    longest: int  # largest position + 1, known on the host (dynamic rotary scaling needs it)
    segments: Tensor | None = None  # [B, T] int32 document number within a packed row; None: every row is one document
    cu_seqlens: Tensor | None = None  # [documents + 1] int32 borders in the flat B·T tokens; padding is one of them
    mask: Tensor | None = None  # [B, 1, T, T] bool, True where a query may look; made by `prepare` if it is needed
    window: int | None = None  # a token sees this many tokens, itself included; None: all before it
    dtype: torch.dtype | None = None  # of what attention reads; set by `prepare`
    windows: dict = field(default_factory=dict, repr=False, compare=False)  # this batch with other windows

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether a token sees another one of its document, from their positions; broadcasts."""
        seen = keys <= queries
        return seen if self.window is None else seen & (queries - keys < self.window)

    @property
    def is_narrow(self) -> bool:
        """Whether the window hides anything."""
        return self.window is not None and self.window < self.longest

    @property
    def is_ordinary(self) -> bool:
        """Whether `sees` is what the kernels compute without a mask; asked for positions at both ends of the rows."""
        positions = torch.cat([torch.arange(64), torch.arange(max(64, self.longest - 64), max(64, self.longest))])
        queries, keys = positions[:, None], positions[None]
        expected = (keys <= queries) & (queries - keys < (self.window or self.longest + 64))
        return torch.equal(self.sees(queries, keys), expected)

    def over_slots(self, count: int) -> "SequenceLayout":
        """The same tokens, with a cache's slots 0 … count - 1 as keys instead of themselves."""
        slots = torch.arange(count, device=self.positions.device)
        return replace(self, mask=self.sees(self.positions[:, None, :, None], slots))

    def with_window(self, window: int | None) -> "SequenceLayout":
        """This batch for blocks whose tokens see `window` tokens."""
        if window == self.window:
            return self
        if window not in self.windows:
            other = replace(self, window=window, mask=None, windows={})
            self.windows[window] = other if self.dtype is None else other.prepare(self.positions.device, self.dtype)
        return self.windows[window]

    def prepare(self, device: torch.device, dtype: torch.dtype) -> "SequenceLayout":
        """Move to `device` and, where attention will need a mask, build it: once per batch, not once per layer."""
        moved = replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            segments=None if self.segments is None else self.segments.to(device, non_blocking=True),
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True),
            dtype=dtype,
            windows={},
        )
        plain = moved.segments is None and not moved.is_narrow
        if moved.is_ordinary and (plain or uses_varlen(device, dtype)):
            return moved
        mask = moved.sees(moved.positions[:, None, :, None], moved.positions[:, None, None, :])
        if moved.segments is not None:
            mask = mask & (moved.segments[:, None, :, None] == moved.segments[:, None, None, :])
        return replace(moved, mask=mask)


def padded_layout(length: int) -> SequenceLayout:
    """Rows of one document each, padded on the right to `length` tokens."""
    return SequenceLayout(torch.arange(length)[None], longest=length)


def packed_layout(lengths: list[list[int]], length: int) -> SequenceLayout:
    """Rows that each hold several documents of the given lengths end to end, then padding up to `length`."""
    positions, segments, borders = [], [], [0]
    for row in lengths:
        parts = [*row, length - sum(row)] if sum(row) < length else row
        positions.append(torch.cat([torch.arange(part) for part in parts]))
        segments.append(torch.repeat_interleave(torch.arange(len(parts), dtype=torch.int32), torch.tensor(parts)))
        for part in parts:
            borders.append(borders[-1] + part)
    stacked = torch.stack(positions)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    return SequenceLayout(stacked, int(stacked.max()) + 1, torch.stack(segments), cu_seqlens)


def uses_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed rows go through variable-length flash attention: CUDA, compute capability 8.0, half precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_attention(config, device: torch.device, dtype: torch.dtype, *, batch: int, length: int) -> str:
    """Measure which kernel of causal attention is faster here, "flash" or "cudnn", and use it from now on.

    Only on CUDA in bfloat16, and not with --deterministic; otherwise PyTorch chooses: "default".
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.are_deterministic_algorithms_enabled():
        return "default"
    length = min(length, 8192)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    shapes = [(max(1, min(batch, 16384 // length)), length, n, config.head_dim) for n in heads]
    q, k, v = (torch.zeros(s, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes)
    seconds = {}
    for name in ("flash", "cudnn"):
        use_attention(name)
        try:
            for repetition in range(5):  # the first two warm up
                if repetition == 2:
                    torch.cuda.synchronize(device)
                    started = time.perf_counter()
                torch.autograd.grad(_causal(q, k, v).sum(), (q, k, v))
            torch.cuda.synchronize(device)
            seconds[name] = time.perf_counter() - started
        except RuntimeError:  # this card or this PyTorch lacks it
            continue
    choice = min(seconds, key=seconds.get, default="default")
    use_attention(choice)
    return choice


def use_attention(name: str) -> None:
    """Let causal attention take this kernel, "flash" or "cudnn", from now on; "default": PyTorch's own choice."""
    torch.backends.cuda.enable_flash_sdp(name != "cudnn")
    torch.backends.cuda.enable_cudnn_sdp(name != "flash")


def describe_attention(device: torch.device, dtype: torch.dtype, packing: bool, choice: str) -> str:
    """One line for the start of a run: which kernel attention will use."""
    if packing and uses_varlen(device, dtype):
        return "attention: packed documents through variable-length flash attention"
    if packing:
        return "attention: packed documents through a block-diagonal mask (no variable-length kernel here)"
    chosen = {"flash": ", by the flash kernel (measured)", "cudnn": ", by cuDNN's kernel (measured)"}.get(choice, "")
    return f"attention: scaled_dot_product_attention{chosen}"


class KVCache:
    """Keys and values of one layer, [B, K, S, H]. A token's slot is its position, so unequal rows need no shifting."""

    def __init__(self, batch: int, heads: int, slots: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.keys = torch.zeros(batch, heads, slots, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def update(self, positions_BT: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens into their slots; returns all slots. Padding's slots are overwritten later."""
        slots = positions_BT[:, None, :, None].expand_as(k_BKTH)
        self.keys.scatter_(2, slots, k_BKTH)
        self.values.scatter_(2, slots, v_BKTH)
        return self.keys, self.values


class Attention(nn.Module):
    """softmax(q kᵀ / √H) v over the tokens that each one sees, with rotary positions.

    N query heads share K ≤ N key/value heads. `config`: hidden_size, num_attention_heads, num_key_value_heads,
    head_dim, attention_bias.
    """

    def __init__(self, config):
        super().__init__()
        dim, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim = config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout, cache: KVCache | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        q_BNTH = apply_rotary(self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)
        k_BKTH, v_BKTH = self.keys_and_values(x, cos, sin, layout)
        if cache is not None:
            k_BKTH, v_BKTH = cache.update(layout.positions.expand(B, T), k_BKTH, v_BKTH)  # all slots from here on
            layout = layout.over_slots(k_BKTH.shape[2])
        out_BNTH = attend(q_BNTH, k_BKTH, v_BKTH, layout)
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(B, T, -1))

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Keys, rotated to their positions, and values: [B, K, T, H] both."""
        B, T, _ = x.shape
        k_BKTH = apply_rotary(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)
        return k_BKTH, self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)


def attend(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, layout: SequenceLayout) -> Tensor:
    """softmax(q kᵀ / √H) v over what each token may see, [B, N, T, H], by the kernel that suits the layout."""
    if layout.mask is not None:
        return _masked(q_BNTH, k_BKTH, v_BKTH, layout.mask)
    if layout.cu_seqlens is not None or layout.is_narrow:
        return _varlen(q_BNTH, k_BKTH, v_BKTH, layout.cu_seqlens, layout.window)
    return _causal(q_BNTH, k_BKTH, v_BKTH)


def _causal(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    # Flash reads shared heads in place. Cards without bfloat16 (T4, V100) lack flash, and of their kernels only the one
    # that keeps all T × T scores takes shared heads: in float16 they are repeated.
    if q_BNTH.is_cuda and q_BNTH.dtype == torch.bfloat16:
        return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=True)
    k_BNTH, v_BNTH = _repeat_heads(k_BKTH, q_BNTH), _repeat_heads(v_BKTH, q_BNTH)
    return F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)


def _masked(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor) -> Tensor:
    k_BNSH, v_BNSH = _repeat_heads(k_BKSH, q_BNTH), _repeat_heads(v_BKSH, q_BNTH)
    return F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask)


def _varlen(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, cu_seqlens: Tensor | None, window: int | None) -> Tensor:
    B, N, T, H = q_BNTH.shape
    if cu_seqlens is None:  # each row is one document
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q_BNTH.device)
    options = {"enable_gqa": True} if _VARLEN_SHARES_HEADS else {}
    if not _VARLEN_SHARES_HEADS:
        k_BKTH, v_BKTH = _repeat_heads(k_BKTH, q_BNTH), _repeat_heads(v_BKTH, q_BNTH)
    q, k, v = (t.transpose(1, 2).reshape(B * T, -1, H) for t in (q_BNTH, k_BKTH, v_BKTH))
    if H % 8:  # the kernel takes multiples of 8; zeros change no product, and the scale stays that of H
        q, k, v = (F.pad(t, (0, -H % 8)) for t in (q, k, v))
    # max_q = T rather than the longest document: a constant, so that compiled blocks never recompile for it.
    options |= {"window_size": (-1 if window is None else window - 1, 0)}  # so many tokens before it, none after
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, scale=H**-0.5, **options)
    return out[..., :H].view(B, T, N, H).transpose(1, 2)


def _repeat_heads(kv_BKSH: Tensor, q_BNTH: Tensor) -> Tensor:
    return kv_BKSH.repeat_interleave(q_BNTH.shape[1] // kv_BKSH.shape[1], dim=1)
