"""Long sequences: the ranks of the context axis divide the tokens of each sample.

A sample of S tokens is cut into 2c runs of S / 2c tokens. Rank r of c holds the runs r and 2c-1-r (zig-zag). Under a
causal mask, queries of an early run attend to few keys and those of a late run to many; each pair has the same total.
For c = 2:

    tokens   [ run 0 | run 1 | run 2 | run 3 ]
    held by    rank 0  rank 1  rank 1  rank 0

Except for attention, the model processes each token separately. Attention needs the keys and values of the whole
sample: either they are all-gathered (`gather_rows`; Llama 3, arXiv 2407.21783, section 3.3.2), or an all-to-all
exchanges tokens for heads (`to_heads` and `to_rows`; DeepSpeed-Ulysses, arXiv 2309.14509). Next: model/attention.py.

Shapes: B batch, S sequence, N heads, H head size; p tokens of a run.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.collectives import gather_over
from megalite.parallel.exchange import exchange_evenly
from megalite.parallel.grid import Axis


@dataclass(frozen=True)
class Rows:
    """The tokens of a sample that a rank of the context axis holds.

    length: S, a multiple of 2c; by_heads: whether attention exchanges tokens for heads instead of gathering keys.
    """

    axis: Axis
    length: int
    by_heads: bool = False

    @classmethod
    def along(cls, axis: Axis, length: int, by_heads: bool = False) -> "Rows | None":
        """The rows of this rank; None if one rank has all tokens."""
        return cls(axis, length, by_heads) if axis.size > 1 else None

    @property
    def count(self) -> int:
        """Number of tokens that this rank holds."""
        return self.length // self.axis.size

    @property
    def runs(self) -> tuple[range, range]:
        """The tokens of the sample that this rank holds, in order."""
        return runs_of(self.length, self.axis.size, self.axis.rank)

    def index(self, device: torch.device) -> Tensor:
        """Indices of this rank's tokens, int64 [S / c]."""
        first, last = self.runs
        return torch.cat(
            [torch.arange(run.start, run.stop, device=device) for run in (first, last)]
        )

    def cut(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a tensor of all tokens, as a copy."""
        return torch.cat([whole.narrow(dim, run.start, len(run)) for run in self.runs], dim)

    def gathered(self, part: Tensor) -> Tensor:
        """All-gathers per-token numbers [B, S / c] of every rank to [B, S]; without autograd."""
        return _joined(gather_over(part, self.axis).unsqueeze(-1)).squeeze(-1)


def runs_of(length: int, size: int, rank: int) -> tuple[range, range]:
    """The two runs of a sample of `length` tokens that one rank of an axis of `size` ranks holds."""
    part = length // (2 * size)
    first, last = rank * part, (2 * size - 1 - rank) * part
    return range(first, first + part), range(last, last + part)


def _joined(parts: Tensor) -> Tensor:
    """The ranks' parts [c, …, S / c, H] -> whole samples in token order, […, S, H]."""
    runs = parts.unflatten(-2, (2, -1))  # [c, …, 2, p, H]
    first, last = runs.unbind(-3)
    # The first runs in the order of the ranks, then the second runs from the last rank to the first.
    whole = torch.cat([first, last.flip(0)])  # [2c, …, p, H]
    return whole.movedim(0, -3).flatten(-3, -2)


def _parted(whole: Tensor, size: int) -> Tensor:
    """Inverse of `_joined`: […, S, H] -> [c, …, S / c, H], contiguous."""
    runs = whole.unflatten(-2, (2 * size, -1))  # […, 2c, p, H]
    first, last = runs.chunk(2, dim=-3)
    parts = torch.stack([first, last.flip(-3)], dim=-3)  # […, c, 2, p, H]
    return parts.flatten(-3, -2).movedim(-3, 0).contiguous()


def _gather(own: Tensor, rows: Rows) -> Tensor:
    """All-gathers […, S / c, H] of every rank to […, S, H]; without autograd."""
    parts = own.new_empty((rows.axis.size, *own.shape))
    with RANK_CLOCK.waiting():
        dist.all_gather_into_tensor(parts.flatten(0, 1), own.contiguous(), group=rows.axis.group)
    return _joined(parts)


def _scatter(whole: Tensor, rows: Rows) -> Tensor:
    """Reduce-scatters […, S, H] to this rank's tokens […, S / c, H]; without autograd."""
    parts = _parted(whole, rows.axis.size)
    own = parts.new_empty(parts.shape[1:])
    with RANK_CLOCK.waiting():
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=rows.axis.group)
    return own


class _GatherRows(torch.autograd.Function):
    """Queries of every rank use all keys, so the gradients of a key are summed on the rank that computed it."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        ctx.rows = rows
        return _gather(torch.stack([key, value]), rows).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, value = _scatter(torch.stack(grads), ctx.rows).unbind()
        return key, value, None


def gather_rows(key: Tensor, value: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """All-gathers keys and values [B, N, S / c, H] of this rank's tokens to [B, N, S, H], in one collective."""
    return _GatherRows.apply(key, value, rows)  # type: ignore[return-value]


def _heads_for_tokens(x: Tensor, rows: Rows) -> Tensor:
    """All heads of this rank's tokens -> this rank's heads of all tokens: [B, N, S / c, H] -> [B, N / c, S, H]."""
    given = x.unflatten(1, (rows.axis.size, -1)).movedim(1, 0).contiguous()
    return _joined(exchange_evenly(given, rows.axis))


def _tokens_for_heads(x: Tensor, rows: Rows) -> Tensor:
    """Inverse of `_heads_for_tokens`."""
    # [c, B, N / c, S / c, H]
    taken = exchange_evenly(_parted(x, rows.axis.size), rows.axis)
    return taken.movedim(0, 1).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _heads_for_tokens(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _tokens_for_heads(grads[0], ctx.rows), None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _tokens_for_heads(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _heads_for_tokens(grads[0], ctx.rows), None


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchanges all heads of this rank's tokens, [B, N, S / c, H] and [B, K, S / c, H], for a part of the heads of all
    tokens, in one all-to-all: the r-th of c equal parts of the query heads, and the key heads that they use.

    If there are fewer key heads than ranks, neighbouring ranks get copies of a head. c must divide N, and must divide K
    or be a multiple of it.
    """
    size = rows.axis.size
    copies = max(1, size // key.shape[1])
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    by_rank = [x.unflatten(1, (size, -1)) for x in (query, key, value)]
    counts = [x.shape[2] for x in by_rank]
    mine = _ToHeads.apply(torch.cat(by_rank, dim=2).flatten(1, 2), rows)
    assert isinstance(mine, Tensor)
    query, key, value = mine.split(counts, dim=1)
    return query, key, value


def to_rows(mixed: Tensor, rows: Rows) -> Tensor:
    """This rank's heads of all tokens [B, N / c, S, H] -> all heads of its tokens [B, N, S / c, H]."""
    return _ToRows.apply(mixed, rows)  # type: ignore[return-value]
