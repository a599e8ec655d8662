"""Dropout that is the same on every layout: whether a number is dropped is a function of (seed, step, sample, layer,
name, index). The generator is counter-based, so each rank can draw just its part of the whole mask.

The generator is splitmix64 (Steele, Lea and Flood 2014), one step for each dim of the index; the same on every device.
Each number takes a dozen operations on 8 bytes; `megalite.train.compile` fuses them into one kernel, with the same
bits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.model.compiled import compiled, compiles

# As signed 64-bit integers, whose products wrap like those of unsigned ones.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
AT_A_TIME = {
    "cpu": 2**16
}  # numbers that are drawn at a time: 512 KiB, which fit into a CPU's cache
AT_A_TIME_ON_DEVICES = 2**22
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


@dataclass(frozen=True)
class Randomness:
    """The key of dropout's random numbers. step: the optimizer step; samples [B] int64: number of each sample in the
    run."""

    seed: int
    step: int
    samples: Tensor


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift, as of an unsigned integer."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def dropped(
    randomness: Randomness, name: str, rate: float, indices: Sequence[range | Tensor]
) -> Tensor:
    """Mask of the numbers to drop, bool [B, …]. indices: for each further dim a range or an int64 tensor [n] of indices
    in the whole tensor. rate: share of numbers to drop. name: full name of this use of dropout, the same on every
    layout.
    """
    digest = hashlib.sha256(f"{randomness.seed}/{randomness.step}/{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    state = _mixed(randomness.samples.long() * _GOLDEN + key)
    *outer, inner = [_counter(index, state.device) for index in indices]
    for counter in outer:
        state = _mixed(state.unsqueeze(-1) + counter)
    limit = int(rate * 2**64) - 2**63
    if compiles() and state.device.type != "cpu":
        return compiled(_below)(state, inner, inner.new_full((), limit))
    result = torch.empty(*state.shape, len(inner), dtype=torch.bool, device=state.device)
    # An attention mask has [B, N, S, T] numbers, each of 8 bytes while it is drawn: do some rows at a time.
    rows = max(1, AT_A_TIME.get(state.device.type, AT_A_TIME_ON_DEVICES) // max(1, len(inner)))
    for drawn, states in zip(
        result.flatten(0, -2).split(rows), state.flatten().split(rows), strict=True
    ):
        torch.lt(_mixed(states.unsqueeze(-1) + inner), limit, out=drawn)
    return result


def _below(state: Tensor, inner: Tensor, limit: Tensor) -> Tensor:
    """The generator's last step, as a function to compile: which numbers [..., n] are below the limit."""
    return _mixed(state.unsqueeze(-1) + inner) < limit


def _counter(index: range | Tensor, device: torch.device) -> Tensor:
    """The increment that the generator adds for each index, int64 [n]."""
    if isinstance(index, range):
        index = torch.arange(index.start, index.stop, device=device)
    return (index + 1) * _GOLDEN


def drop(
    x: Tensor, randomness: Randomness | None, name: str, rate: float, rows: range | Tensor
) -> Tensor:
    """Dropout of hidden states x [B, S, D]. rows: index of each of the S tokens in the whole sequence."""
    if randomness is None or rate == 0.0:
        return x
    indices = [rows, range(x.shape[2])]
    return x.masked_fill(dropped(randomness, name, rate, indices), 0.0) / (1 - rate)
