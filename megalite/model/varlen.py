"""Attention within pieces of a micro-batch, each by itself and in a window, without a mask: torch's flash kernel.

The kernels of scaled_dot_product_attention that take a mask read one of S² numbers and are slower by far; this one is
told where each piece of the flattened micro-batch begins. It is NVIDIA's alone; elsewhere attention.py makes a mask.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGEST_HEAD = 256  # features that the kernel takes, a multiple of 8
LEAST_CAPABILITY = (8, 0)


class Bounds(NamedTuple):
    """Pieces that B · S tokens are cut into: where each begins, and the end, int32 [pieces + 1] on the device; and the
    longest piece's tokens, which the host must know."""

    starts: Tensor
    longest: int


def rows_as_pieces(b: int, s: int, device: torch.device) -> Bounds:
    """Each row of [B, S] is a piece."""
    return Bounds(torch.arange(0, b * s + 1, s, dtype=torch.int32, device=device), s)


def documents_as_pieces(documents: np.ndarray) -> Bounds:
    """Each run of one number in a row of `documents` [B, S] is a piece; in main memory, where its numbers are known
    without waiting for a device."""
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = np.append(np.flatnonzero(begins), documents.size)
    return Bounds(torch.from_numpy(starts.astype(np.int32)), int(np.diff(starts).max()))


def kernel_takes(device_type: str, dtype: torch.dtype, head_size: int) -> bool:
    """Whether there is a kernel for such heads on a new enough device of this type."""
    if (
        device_type != "cuda"
        or torch.version.hip is not None
        or dtype not in (torch.bfloat16, torch.float16)
    ):
        return False
    return head_size <= LARGEST_HEAD and head_size % 8 == 0


@cache
def new_enough(device: torch.device) -> bool:
    """Whether the device has the kernel's instructions."""
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, window: int | None
) -> Tensor:
    """Causal attention in each piece; window: of how many positions a token sees, itself included.

    query [B, N, S, H]; key, value [B, K, S, H]; result like query, in memory as [B, S, N, H].
    """
    from torch.nn.attention.varlen import (
        varlen_attn,  # takes seconds, which runs on a CPU do without
    )

    b, n, s, h = query.shape
    query, key, value = (x.transpose(1, 2).reshape(b * s, -1, h) for x in (query, key, value))
    starts, longest = bounds
    left = -1 if window is None else window - 1  # the kernel counts those before the token
    grouped = query.shape[1] != key.shape[1]
    mixed = varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        window_size=(left, 0),
        enable_gqa=grouped,
    )
    assert isinstance(mixed, Tensor)
    return mixed.view(b, s, n, h).transpose(1, 2)
