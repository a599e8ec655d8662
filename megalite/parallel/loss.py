"""Cross entropy over a vocabulary that the tensor axis splits: no rank ever holds a whole row of logits.

Each rank has the logits of its ids; the maximum, the sum of exponentials and the label's logit are three
numbers a token that cross the axis. The product with the head's weight is part of it, in chunks of tokens.
Where gradients are wanted they are made in the same pass: logits are made once, their gradients take their place, and
no more of them than a chunk's is ever in memory. Next: model/transformer.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megalite.parallel.collectives import max_over, sum_over
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share

IGNORED = -100  # torch's and transformers' label for "does not count"
LEAST_ROWS = 256  # of a chunk on a CPU
LEAST_ROWS_OF_DEVICES = 2048  # GPUs need larger products
IN_CACHE = 2**18  # logits that a CPU works on at a time: 1 MiB in fp32
AT_A_TIME_ON_DEVICES = 2**26  # logits that other devices do: 256 MiB in fp32
ROW_BYTES = 16  # that a row of logits is a multiple of on other devices
PRODUCT_ROWS = 2048  # of the weight's gradient that a CPU makes at a time, where it must be added in another type


def gradient_type(dtype: torch.dtype) -> torch.dtype:
    """What gradients are made in. fp16 has no room for small probabilities, which the loss scale has not raised yet."""
    return torch.float32 if dtype == torch.float16 else dtype


@contextmanager
def _ten_bits(wanted: bool) -> Iterator[None]:
    """Inside, GPUs may take fp32 products in TF32, several times faster: it has fp32's range, and as many bits of the
    fraction as fp16, which the factors come from."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _Gradients:
    """Of the sum of losses with respect to hidden states, weight and bias, summed over the chunks; None where not
    wanted. Products are in `dtype`, their sums over chunks in fp32."""

    def __init__(
        self, wanted: tuple[bool, bool, bool], hidden: Tensor, weight: Tensor, chunks: int
    ) -> None:
        self.dtype = gradient_type(weight.dtype)
        self.raised = self.dtype != weight.dtype
        self.factor = weight.to(self.dtype) if wanted[0] else None
        self.hidden = hidden.new_empty(hidden.shape, dtype=self.dtype) if wanted[0] else None
        sums = self.dtype if chunks == 1 else torch.float32
        make = weight.new_empty if chunks > 0 else weight.new_zeros
        self.weight = make(weight.shape, dtype=sums) if wanted[1] else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if wanted[2] else None

    def add(self, slopes: Tensor, chunk: Tensor, first: int) -> None:
        """slopes [n, V / t], of the logits of `chunk` [n, D], whose first row is `first` of the hidden states."""
        if self.hidden is not None and self.factor is not None:
            torch.mm(slopes, self.factor, out=self.hidden[first : first + len(chunk)])
        if self.weight is None:
            return
        chunk, turned = chunk.to(self.dtype), slopes.t()
        if self.weight.dtype == self.dtype:
            self.weight.addmm_(turned, chunk, beta=0 if first == 0 else 1)
            return
        rows = PRODUCT_ROWS if chunk.device.type == "cpu" else turned.shape[0]
        for total, part in zip(self.weight.split(rows), turned.split(rows), strict=True):
            product = part @ chunk
            total.copy_(product) if first == 0 else total.add_(product)


def _sum_of_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    vocabulary_size: int,
    axis: Axis,
    z_loss: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, _Gradients]:
    """For hidden [n, D] and labels [n]."""
    tokens, size = hidden.shape
    start, _ = share(vocabulary_size, axis)
    columns = -(-vocabulary_size // axis.size)
    width = gradient_type(weight.dtype).itemsize
    rows = chunk_rows(tokens, size, columns, width, hidden.device.type)
    gradients = _Gradients(wanted, hidden, weight, -(-tokens // rows))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    room = _Room(min(rows, tokens), columns, weight, gradients.dtype, axis)
    for first in range(0, tokens, rows):
        chunk, chunk_labels = hidden[first : first + rows], labels[first : first + rows]
        logits = room.logits(chunk, weight, bias)
        blocks = zip(logits.split(room.step), chunk_labels.split(room.step), strict=True)
        for block, block_labels in blocks:
            scores = room.in_fp32(block)
            losses, slopes = _losses_and_slopes(
                scores, block_labels, start, axis, z_loss, any(wanted)
            )
            total += losses.sum()
            if gradients.bias is not None:
                gradients.bias += slopes.sum(dim=0)
            # In fp32 the slopes have already taken the place of the logits.
            if room.wide is not None and any(wanted):
                block.copy_(slopes)
        if any(wanted):
            with _ten_bits(gradients.raised):
                gradients.add(logits, chunk, first)
    return total, gradients


class _Room:
    """Memory for the logits of one chunk at a time, of at most `rows` rows; columns: of the largest rank.

    product: in the weight's type; raised: in the type of gradients, where that is another; wide: of `step` rows in
    fp32, where gradients are not in fp32.
    """

    def __init__(
        self, rows: int, columns: int, weight: Tensor, dtype: torch.dtype, axis: Axis
    ) -> None:
        self.step = block_rows(rows, columns, axis.size, weight.device.type)
        columns = weight.shape[0]
        self.product = _rows(weight, rows, columns, weight.dtype)
        self.raised = self.wide = None
        if dtype != weight.dtype:
            self.raised = _rows(weight, rows, columns, dtype)
        if dtype != torch.float32:
            self.wide = weight.new_empty(self.step, columns, dtype=torch.float32)

    def logits(self, chunk: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """chunk weightᵀ + bias, in the type of gradients."""
        logits = self.product[: len(chunk)]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        return logits if self.raised is None else self.raised[: len(chunk)].copy_(logits)

    def in_fp32(self, block: Tensor) -> Tensor:
        """The block itself, or a copy."""
        return block if self.wide is None else self.wide[: len(block)].copy_(block)


def _rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for logits [rows, columns], which are factors or the result of products."""
    length = row_length(columns, dtype.itemsize, like.device.type)
    return like.new_empty(rows, length, dtype=dtype)[:, :columns]


def row_length(columns: int, width: int, device: str) -> int:
    """Numbers from one row of logits to the next, of `width` bytes each. With an odd vocabulary, such as GPT-2's, or an
    uneven slice of one, rows that follow one another begin anywhere, and a GPU's kernels load a few bytes at a time."""
    unit = 1 if device == "cpu" else ROW_BYTES // width
    return -(-columns // unit) * unit


def block_rows(rows: int, columns: int, ranks: int, device: str) -> int:
    """Rows of a chunk of logits that are worked on at a time, in fp32. A CPU makes several passes over what fits its
    cache. With a split vocabulary each block costs messages, so on a CPU a chunk is one block there. columns: as of
    `chunk_rows`, so that all ranks cut the same blocks; ranks: of the axis."""
    if device != "cpu":
        return max(1, min(rows, AT_A_TIME_ON_DEVICES // columns))
    return max(1, min(rows, IN_CACHE // columns) if ranks == 1 else rows)


class _HeadLoss(torch.autograd.Function):
    """The sum of losses, whose gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        vocabulary_size: int,
        axis: Axis,
        z_loss: float,
        wanted: tuple[bool, bool, bool],
        counted: Tensor | None,
    ) -> Tensor:
        counted = _rows_that_count(labels) if counted is None else counted
        some, some_labels = (
            (hidden, labels) if counted is None else (hidden[counted], labels[counted])
        )
        total, gradients = _sum_of_losses(
            some, weight, bias, some_labels, vocabulary_size, axis, z_loss, wanted
        )
        slopes = gradients.hidden
        if slopes is not None and counted is not None:
            slopes = slopes.new_zeros(hidden.shape).index_copy_(0, counted, slopes)
        ctx.save_for_backward(slopes, gradients.weight, gradients.bias)
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward raises, since autograd sees that what it saved has changed.
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(
            None if value is None else value.mul_(grads[0]).to(dtype) for value, dtype in made
        ), *[None] * 6


def _rows_that_count(labels: Tensor) -> Tensor | None:
    """Indices of the labels that count; None: all are taken. On other devices than a CPU their number is not known
    without waiting, so that all are where the caller does not know it either."""
    if labels.device.type != "cpu":
        return None
    counted = (labels != IGNORED).nonzero().squeeze(-1)
    return None if len(counted) == len(labels) else counted


def _losses_and_slopes(
    logits: Tensor, labels: Tensor, start: int, axis: Axis, z_loss: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Losses [n] of tokens and d loss / d logits [n, V / t], which takes the place of the logits (fp32)."""
    peak = max_over(logits.amax(dim=-1), axis)
    counts = labels != IGNORED
    here = (labels >= start) & (labels < start + logits.shape[-1])
    columns = (labels - start).masked_fill(~here, 0).unsqueeze(-1)
    scores = logits.sub_(peak.unsqueeze(-1))
    label_score = scores.gather(-1, columns).squeeze(-1).masked_fill(~here, 0.0)
    exponentials = scores.exp_()
    # One message for both sums.
    total, label_score = sum_over(torch.stack([exponentials.sum(dim=-1), label_score]), axis)
    losses = total.log() - label_score
    # z-loss (PaLM, arXiv 2204.02311, section 5): log² of the sum of exponentials, which keeps it near 1.
    log_sum = total.log() + peak
    if z_loss > 0 and wanted:
        losses = losses + z_loss * log_sum.square()
    if wanted:
        factor = counts * (1 + 2 * z_loss * log_sum) / total
        exponentials.mul_(factor.unsqueeze(-1))
        exponentials.scatter_add_(
            -1, columns, -(here & counts).to(exponentials.dtype).unsqueeze(-1)
        )
    return losses.masked_fill(~counts, 0.0), exponentials


def token_losses(logits: Tensor, labels: Tensor, vocabulary_size: int, axis: Axis) -> Tensor:
    """Losses [n] of tokens in nats, fp32, the same on every rank of the axis; without autograd. logits [n, V / t],
    fp32, are overwritten; labels [n] as in `head_loss`."""
    start, _ = share(vocabulary_size, axis)
    return _losses_and_slopes(logits, labels, start, axis, 0.0, wanted=False)[0]


def chunk_rows(tokens: int, size: int, columns: int, width: int, device: str) -> int:
    """Tokens of a chunk of `tokens` hidden states of `size` numbers of `width` bytes on a type of device.

    A chunk's logits take no more bytes than the weight's gradient in fp32, [V / t, D], to which each chunk adds, and
    no more than the hidden states, whichever is more; but products of few rows are slow. Chunks are of nearly one size.
    columns: of the axis's largest share of the vocabulary, so that all ranks cut the same chunks, whose sums they
    exchange.
    """
    least = LEAST_ROWS if device == "cpu" else LEAST_ROWS_OF_DEVICES
    rows = max(least, size * 4 // width, tokens * size // columns)
    return max(1, -(-tokens // max(1, -(-tokens // rows))))


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    vocabulary_size: int,
    axis: Axis,
    z_loss: float = 0.0,
    counted: Tensor | None = None,
) -> Tensor:
    """Sum (not mean) of the losses of the tokens that count, in nats, fp32, the same on every rank of the axis.

    hidden [..., D], `enter`ed; weight [V / t, D]; logits are hidden weightᵀ + bias; labels [...] int64 in [0, V)
    or -100. z_loss: weight of the squared log of the sum of exponentials, part of the loss where gradients are wanted,
    and not in evaluation. counted [n] int64: which labels count, of all flattened, where the caller knows it: nothing
    is computed of others. Gradients of weight and bias are fp32 sums over the chunks; there is one backward.
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    enabled = torch.is_grad_enabled()
    wanted = tuple(
        enabled and value is not None and value.requires_grad for value in (hidden, weight, bias)
    )
    return _HeadLoss.apply(
        flat, weight, bias, labels, vocabulary_size, axis, z_loss, wanted, counted
    )  # type: ignore[return-value]
