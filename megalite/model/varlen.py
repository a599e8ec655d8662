"""Attention within pieces of a micro-batch, each by itself and in a window, without a mask: torch's flash kernel.

The kernels of scaled_dot_product_attention that take a mask read one of S² numbers and are slower by far; this one is
told where each piece of the flattened micro-batch begins. It is NVIDIA's alone; elsewhere attention.py makes a mask.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGEST_HEAD = 256  # features that the kernel takes, a multiple of 8
LEAST_CAPABILITY = (8, 0)
TILE = 128  # queries that the kernel takes at once


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


class RunPieces(NamedTuple):
    """Pieces of one run of tokens (parallel/rows.py) in B samples, and of the keys that they look at.

    keys: which of B · S keys those are, in order, int64 [n]; queries, of_keys: as many pieces of the run's B · p tokens
    and of those keys. The last key of a piece is that of its last query.
    """

    keys: Tensor
    queries: Bounds
    of_keys: Bounds


def runs_as_pieces(documents: np.ndarray, runs: Sequence[range]) -> tuple[RunPieces, ...]:
    """Each run's parts of documents, and the keys from the start of each document on; in main memory. documents [B, S]
    as in `documents_as_pieces`."""
    return tuple(_run_as_pieces(documents, run) for run in runs)


def _run_as_pieces(documents: np.ndarray, run: range) -> RunPieces:
    b, s = documents.shape
    queries = documents_as_pieces(documents[:, run.start : run.stop])
    starts = queries.starts.numpy()
    # Where the document begins that the run's first token is of.
    index = np.arange(run.start + 1)
    begins = np.ones((b, run.start + 1), bool)
    begins[:, 1:] = documents[:, 1 : run.start + 1] != documents[:, : run.start]
    first = np.where(begins, index, 0).max(axis=1)
    lengths = np.diff(starts)
    lengths[starts[:-1] % len(run) == 0] += (run.start - first).astype(lengths.dtype)
    of_keys = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    keys = [np.arange(row * s + first[row], row * s + run.stop) for row in range(b)]
    looked_at = Bounds(torch.from_numpy(of_keys), int(lengths.max()))
    return RunPieces(torch.from_numpy(np.concatenate(keys)), queries, looked_at)


def rows_of_runs(
    b: int, s: int, runs: Sequence[range], device: torch.device
) -> tuple[RunPieces, ...]:
    """The same where each sample of [B, S] is one document."""
    rows, result = torch.arange(b, device=device).unsqueeze(-1) * s, []
    for run in runs:
        keys = (rows + torch.arange(run.stop, device=device)).flatten()
        pieces = [rows_as_pieces(b, length, device) for length in (len(run), run.stop)]
        result.append(RunPieces(keys, *pieces))
    return tuple(result)


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    window: int | None,
    causal: bool = True,
) -> Tensor:
    """Attention in each piece; window: of how many positions a token sees, itself included, to each side without
    `causal`.

    query [B, N, S, H]; key, value [B, K, S, H]; result like query, in memory as [B, S, N, H].
    """
    b, n, s, h = query.shape
    query, key, value = (_flat(x) for x in (query, key, value))
    mixed = _kernel(query, key, value, bounds, bounds, window, causal)
    return mixed.view(b, s, n, h).transpose(1, 2)


def prefixes_as_pieces(documents: np.ndarray, prefixes: np.ndarray) -> Bounds:
    """Each document's prefix is a piece. The rest, whose results are not used, is cut into pieces of a kernel's tile,
    so that little is computed for it. In main memory. documents, prefixes [B, S]."""
    tiles = np.arange(documents.shape[1]) // TILE + 1
    return documents_as_pieces(documents * (tiles[-1] + 1) + np.where(prefixes, 0, tiles))


def attend_prefixes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    halves: Bounds,
    prefixes: Tensor,
    window: int | None,
) -> Tensor:
    """Attention in each piece, causal but in its prefix, whose tokens see each other both ways.

    Two calls: causally in `bounds`, of which the prefixes are not taken, and both ways in `halves`
    (`prefixes_as_pieces`), of which they alone are. So no row has to be copied out and back. prefixes bool [B, S];
    others as in `attend_pieces`.
    """
    causal = attend_pieces(query, key, value, bounds, window)
    both_ways = attend_pieces(query, key, value, halves, window, causal=False)
    return torch.where(prefixes[:, None, :, None], both_ways, causal)


def attend_runs_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[RunPieces], window: int | None
) -> Tensor:
    """The same, causal, for the two runs of tokens that a rank of the context axis holds. query [B, N, S / c, H]; key,
    value [B, K, S, H]; result like query, in memory as [B, S / c, N, H]."""
    b, n, _, h = query.shape
    key, value, mixed = _flat(key), _flat(value), []
    for own, pieces in zip(query.chunk(2, dim=2), runs, strict=True):
        seen_keys, seen_values = (x.index_select(0, pieces.keys) for x in (key, value))
        bounds = pieces.queries, pieces.of_keys
        result = _kernel(_flat(own), seen_keys, seen_values, *bounds, window)
        mixed.append(result.view(b, -1, n, h))
    return torch.cat(mixed, dim=1).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[B, N, S, H] -> [B · S, N, H]"""
    return x.transpose(1, 2).flatten(0, 1)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Bounds,
    keys: Bounds,
    window: int | None,
    causal: bool = True,
) -> Tensor:
    """query [n, N, H] in pieces, key and value [m, K, H] in as many. A piece's last query looks at its last key too, as
    in flash attention since version 2.1."""
    from torch.nn.attention.varlen import (
        varlen_attn,  # takes seconds, which runs on a CPU do without
    )

    left = -1 if window is None else window - 1  # the kernel counts those before the token
    mixed = varlen_attn(
        query,
        key,
        value,
        queries.starts,
        keys.starts,
        queries.longest,
        keys.longest,
        window_size=(left, 0 if causal else left),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed
