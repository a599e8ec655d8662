"""Rotary positions (arXiv 2104.09864): pairs of a head's features turn by an angle that grows with the position.

The scalings stretch the angles of a model beyond the length that it was trained at; each is computed in the order
of operations of transformers' `modeling_rope_utils.py`, so that frequencies are equal to the bit.
"""

import math

import torch
from torch import Tensor

from megalite.model.spec import Rotary


def frequencies(rotary: Rotary, length: int, device: torch.device | None = None) -> Tensor:
    """Radians a position for each pair, fp32 [size / 2, rounded up]; `length` of the sequence counts for
    `dynamic` alone."""
    theta, size = rotary.theta, rotary.size
    if rotary.scaling == "dynamic":  # NTK-aware: the base grows with the length
        grown = rotary.factor * max(length, rotary.max_positions) / rotary.max_positions - (rotary.factor - 1)
        theta = theta * grown ** (size / (size - 2))
    wavelengths = theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if rotary.scaling == "yarn":
        return _yarn(rotary, wavelengths)
    plain = 1.0 / wavelengths
    if rotary.scaling == "linear":
        return plain / rotary.factor
    return _llama3(rotary, plain) if rotary.scaling == "llama3" else plain


def _llama3(rotary: Rotary, plain: Tensor) -> Tensor:
    """Llama 3.1: slow pairs are divided by the factor, fast ones kept, those between blended."""
    low, high, length = rotary.low_frequency_factor, rotary.high_frequency_factor, rotary.original_positions
    turn = 2 * math.pi / plain  # positions a full turn
    slow = turn > length / low
    result = torch.where(slow, plain / rotary.factor, plain)
    share = (length / turn - low) / (high - low)
    blend = (1 - share) * result / rotary.factor + share * result
    between = ~(turn < length / high) & ~slow
    return torch.where(between, blend, result)


def _yarn(rotary: Rotary, wavelengths: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over the pairs from kept to divided frequencies."""

    def pair_that_turns(times: float) -> float:
        turns = rotary.original_positions / (times * 2 * math.pi)
        return rotary.size * math.log(turns) / (2 * math.log(rotary.theta))

    low, high = pair_that_turns(rotary.beta_fast), pair_that_turns(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.size - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(rotary.size // 2, dtype=torch.float32, device=wavelengths.device)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rotary.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def turns(rotary: Rotary, positions: Tensor, spans: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, size / 2] of positions [B, S] int64; angles in fp32. spans: as `Context.spans`, for
    `dynamic` alone."""
    own = frequencies(rotary, 0, positions.device) if spans is None else _frequencies_of(rotary, spans)
    angles = positions.unsqueeze(-1).float() * own
    cosine, sine = angles.cos() * rotary.attention_factor, angles.sin() * rotary.attention_factor
    return cosine.unsqueeze(1).to(dtype), sine.unsqueeze(1).to(dtype)


def _frequencies_of(rotary: Rotary, spans: Tensor) -> Tensor:
    """Radians a position for each token and pair, fp32 [B or 1, S or 1, size / 2]."""
    # By a token's own sequence: the longest of a micro-batch would make the result depend on what shares it.
    lengths, which = spans.clamp(min=rotary.max_positions).unique(return_inverse=True)
    return torch.stack([frequencies(rotary, length, spans.device) for length in lengths.tolist()])[which]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """Turns the first features of each head of x [B, N, S, H]; cosine and sine from `turns`.

    The result lies in memory as [B, S, N, H]: attention's own lies like its queries, and the output projection then
    reads it without a copy, which backward would keep.
    """
    size = 2 * cosine.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    first, second = first * cosine - second * sine, second * cosine + first * sine
    turned = [torch.stack([first, second], dim=-1).flatten(-2)] if interleaved else [first, second]
    parts = turned + [rest] * (size < x.shape[-1])
    return torch.cat([part.transpose(1, 2) for part in parts], dim=-1).transpose(1, 2)
