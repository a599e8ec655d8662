"""Rotary embeddings (arXiv 2104.09864): rotate pairs of a head's features by an angle proportional to the position.

The scalings extend a model beyond the length that it was trained at; each is computed in the order of operations of
transformers' `modeling_rope_utils.py`, so that frequencies are equal bit for bit.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megalite.model.compiled import compiled, compiles
from megalite.model.spec import Rotary


def frequencies(rotary: Rotary, length: int, device: torch.device | None = None) -> Tensor:
    """Radians per position for each pair, fp32 [size / 2, rounded up]. length: of the sequence, only used by
    `dynamic`."""
    theta, size = rotary.theta, rotary.size
    if rotary.scaling == "dynamic":  # NTK-aware: the base grows with the length
        grown = rotary.factor * max(length, rotary.max_positions) / rotary.max_positions - (
            rotary.factor - 1
        )
        theta = theta * grown ** (size / (size - 2))
    wavelengths = theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if rotary.scaling == "yarn":
        return _yarn(rotary, wavelengths)
    plain = 1.0 / wavelengths
    if rotary.scaling == "linear":
        return plain / rotary.factor
    return _llama3(rotary, plain) if rotary.scaling == "llama3" else plain


def _llama3(rotary: Rotary, plain: Tensor) -> Tensor:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated."""
    low = rotary.low_frequency_factor
    high = rotary.high_frequency_factor
    length = rotary.original_positions
    turn = 2 * math.pi / plain  # positions per full turn
    slow = turn > length / low
    result = torch.where(slow, plain / rotary.factor, plain)
    share = (length / turn - low) / (high - low)
    blend = (1 - share) * result / rotary.factor + share * result
    between = ~(turn < length / high) & ~slow
    return torch.where(between, blend, result)


def _yarn(rotary: Rotary, wavelengths: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a linear ramp over the pairs from unchanged to divided frequencies."""

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


def turns(
    rotary: Rotary, positions: Tensor, spans: Tensor | int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, size / 2] of positions [B, S] int64; angles in fp32. spans: `Context.spans` or
    `Context.known_span`, only used by `dynamic`."""
    if isinstance(spans, Tensor):
        own = _frequencies_of(rotary, spans)
    else:
        length = 0 if spans is None else max(spans, rotary.max_positions)
        own = frequencies(rotary, length, positions.device)
    angles = positions.unsqueeze(-1).float() * own
    cosine, sine = angles.cos() * rotary.attention_factor, angles.sin() * rotary.attention_factor
    return cosine.unsqueeze(1).to(dtype), sine.unsqueeze(1).to(dtype)


def _frequencies_of(rotary: Rotary, spans: Tensor) -> Tensor:
    """Radians per position for each token and pair, fp32 [B or 1, S or 1, size / 2]."""
    # By each token's own sequence: with the longest of the micro-batch, results would depend on the other samples.
    lengths, which = spans.clamp(min=rotary.max_positions).unique(return_inverse=True)
    return torch.stack([frequencies(rotary, length, spans.device) for length in lengths.tolist()])[
        which
    ]


def spread(cosine: Tensor, interleaved: bool) -> Tensor:
    """Repeats each pair's cosine for both of its features: [..., size / 2] -> [..., size]."""
    return (
        cosine.repeat_interleave(2, dim=-1) if interleaved else torch.cat([cosine, cosine], dim=-1)
    )


class _Rotate(torch.autograd.Function):
    """Backward rotates the gradient by the negative angles, so x is not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.interleaved = interleaved
        return _turned_by_one(x, cosine, sine, interleaved, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned_by_one(grads[0], cosine, sine, ctx.interleaved, -1), None, None, None


def _turned_by_one(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, sign: int) -> Tensor:
    """`rotate` without autograd; sign -1: by the negative angles."""
    if not compiles():
        return _turned(x, cosine, sine, interleaved, sign)
    result = compiled(_expression)(
        *(y.transpose(1, 2) for y in (x, cosine, sine)), interleaved, sign
    )
    return result.transpose(1, 2)


def _expression(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, sign: int) -> Tensor:
    """`_turned` as a function to compile: without writes to slices, and with S before N."""
    size, half, sine = cosine.shape[-1], sine.shape[-1], sign * sine
    if interleaved:
        first, second, own = x[..., :size:2], x[..., 1:size:2], cosine[..., ::2]
        pairs = [first * own - second * sine, second * own + first * sine]
        turned = torch.stack(pairs, dim=-1).flatten(-2)
    else:
        first, second, own = x[..., :half], x[..., half:size], cosine[..., :half]
        turned = torch.cat([first * own - second * sine, second * own + first * sine], dim=-1)
    return torch.cat([turned, x[..., size:]], dim=-1) if size < x.shape[-1] else turned


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, sign: int) -> Tensor:
    """`_turned_by_one` in three kernels, not compiled."""
    size, half = cosine.shape[-1], sine.shape[-1]
    result = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )
    turning = torch.mul(x[..., :size], cosine, out=result[..., :size])
    first, second = (
        (slice(0, size, 2), slice(1, size, 2)) if interleaved else (slice(half), slice(half, size))
    )
    turning[..., first].addcmul_(x[..., second], sine, value=-sign)
    turning[..., second].addcmul_(x[..., first], sine, value=sign)
    if size < x.shape[-1]:
        result[..., size:] = x[..., size:]
    return result


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first features of each head of x [B, N, S, H]; cosine [B or 1, 1, S, size] from `spread`, sine
    [B or 1, 1, S, size / 2] from `turns`.

    The result's memory layout is [B, S, N, H]. Attention's output has the layout of its queries, so the output
    projection reads it without a copy, which backward would store.
    """
    return _Rotate.apply(x, cosine, sine, interleaved)  # type: ignore[return-value]
