"""Attention within pieces of a micro-batch, optionally in a window, without a mask: torch's varlen flash kernel.

The kernels of scaled_dot_product_attention that take a mask read S² numbers and are far slower; this kernel takes the
start of each piece of the flattened micro-batch. It runs only on NVIDIA GPUs; elsewhere attention.py uses a mask.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGEST_HEAD = 256  # most features per head that the kernel supports; they must be a multiple of 8
LEAST_CAPABILITY = (8, 0)
TILE = 128  # queries that the kernel processes at once


class Bounds(NamedTuple):
    """The pieces that B · S tokens are cut into. starts: index of each piece's first token, and the end, int32
    [pieces + 1] on the device; longest: tokens of the longest piece, which the host must know."""

    starts: Tensor
    longest: int


def rows_as_pieces(b: int, s: int, device: torch.device) -> Bounds:
    """Bounds with each row of [B, S] as a piece."""
    return Bounds(torch.arange(0, b * s + 1, s, dtype=torch.int32, device=device), s)


def documents_as_pieces(documents: np.ndarray) -> Bounds:
    """Bounds with each run of equal numbers in a row of `documents` [B, S] as a piece. They are in main memory, so that
    they are known without synchronizing with a device."""
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = np.append(np.flatnonzero(begins), documents.size)
    return Bounds(torch.from_numpy(starts.astype(np.int32)), int(np.diff(starts).max()))


class RunPieces(NamedTuple):
    """Pieces of one run of tokens (parallel/rows.py) in B samples, and of the keys that they attend to.

    keys: indices of those keys among B · S, in order, int64 [n]; queries, of_keys: corresponding pieces of the run's
    B · p tokens and of those keys. The last key of a piece belongs to its last query.
    """

    keys: Tensor
    queries: Bounds
    of_keys: Bounds


def runs_as_pieces(documents: np.ndarray, runs: Sequence[range]) -> tuple[RunPieces, ...]:
    """For each run its parts of documents, and the keys from the start of each document; in main memory. documents
    [B, S]: as in `documents_as_pieces`."""
    return tuple(_run_as_pieces(documents, run) for run in runs)


def _run_as_pieces(documents: np.ndarray, run: range) -> RunPieces:
    b, s = documents.shape
    queries = documents_as_pieces(documents[:, run.start : run.stop])
    starts = queries.starts.numpy()
    # The first token of the document that the run's first token belongs to.
    index = np.arange(run.start + 1)
    begins = np.ones((b, run.start + 1), bool)
    begins[:, 1:] = documents[:, 1 : run.start + 1] != documents[:, : run.start]
    first = np.where(begins, index, 0).max(axis=1)
    lengths = np.diff(starts)
    lengths[starts[:-1] % len(run) == 0] += (run.start - first).astype(lengths.dtype)
    of_keys = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    keys = [np.arange(row * s + first[row], row * s + run.stop) for row in range(b)]
    key_bounds = Bounds(torch.from_numpy(of_keys), int(lengths.max()))
    return RunPieces(torch.from_numpy(np.concatenate(keys)), queries, key_bounds)


def rows_of_runs(
    b: int, s: int, runs: Sequence[range], device: torch.device
) -> tuple[RunPieces, ...]:
    """`runs_as_pieces` with each sample of [B, S] as one document."""
    rows, result = torch.arange(b, device=device).unsqueeze(-1) * s, []
    for run in runs:
        keys = (rows + torch.arange(run.stop, device=device)).flatten()
        pieces = [rows_as_pieces(b, length, device) for length in (len(run), run.stop)]
        result.append(RunPieces(keys, *pieces))
    return tuple(result)


def kernel_takes(device_type: str, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel supports such heads on a new enough device of this type."""
    if (
        device_type != "cuda"
        or torch.version.hip is not None
        or dtype not in (torch.bfloat16, torch.float16)
    ):
        return False
    return head_size <= LARGEST_HEAD and head_size % 8 == 0


@cache
def new_enough(device: torch.device) -> bool:
    """Whether the device has the instructions that the kernel needs."""
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def takes_groups(query: Tensor, visible: Tensor | None) -> bool:
    """Whether the device's kernel takes fewer key heads than query heads: flash attention, which supports no mask, 16
    bits, and NVIDIA GPUs from compute capability 8.0. Without one, torch multiplies matrices in fp32, with the keys and
    values repeated for each query head."""
    if query.device.type in ("cpu", "meta"):
        return True
    return visible is None and query.itemsize == 2 and new_enough(query.device)


def attend_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    window: int | None,
    causal: bool = True,
) -> Tensor:
    """Attention within each piece. window: number of visible positions including the token itself; to each side without
    `causal`.

    query [B, N, S, H]; key, value [B, K, S, H]; the result has the shape of query and the memory layout [B, S, N, H].
    """
    b, n, s, h = query.shape
    query, key, value = (_flat(x) for x in (query, key, value))
    mixed = _kernel(query, key, value, bounds, bounds, window, causal)
    return mixed.view(b, s, n, h).transpose(1, 2)


def prefixes_as_pieces(documents: np.ndarray, prefixes: np.ndarray) -> Bounds:
    """Bounds with each document's prefix as a piece. The rest, whose results are not used, is cut into pieces of the
    kernel's tile size, so that little is computed for it. In main memory. documents, prefixes [B, S]."""
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
    """Attention within each piece, causal except in its prefix, whose tokens attend to each other in both directions.

    Two calls: a causal one in `bounds`, and a bidirectional one in `halves` (`prefixes_as_pieces`), whose results are
    used for the prefixes only. So no row has to be copied out and back. prefixes bool [B, S]; others as in
    `attend_pieces`.
    """
    causal = attend_pieces(query, key, value, bounds, window)
    bidirectional = attend_pieces(query, key, value, halves, window, causal=False)
    return torch.where(prefixes[:, None, :, None], bidirectional, causal)


def attend_runs_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[RunPieces], window: int | None
) -> Tensor:
    """Causal attention within pieces for the two runs of tokens that a rank of the context axis holds. query
    [B, N, S / c, H]; key, value [B, K, S, H]; the result has the shape of query and the memory layout
    [B, S / c, N, H]."""
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
    """Calls the kernel with query [n, N, H] and key, value [m, K, H] in equally many pieces. With `causal` the mask is
    aligned to the lower right: a piece's last query attends to its last key, as in flash attention from version 2.1."""
    # The import takes seconds, which runs on a CPU do not need.
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1  # the kernel does not count the token itself
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
