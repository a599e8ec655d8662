"""Cross-entropy over a vocabulary that the tensor axis splits: no rank ever holds a whole row of logits.

Each rank computes the logits of its own ids. Three numbers per token cross the axis: the maximum, the sum of
exponentials and the label's logit. The product with the head's weight is fused in, in chunks of tokens. If gradients
are needed, they are computed in the same pass: each chunk's logits are computed once and overwritten by their
gradients, so that only one chunk of logits is ever in memory. Next: model/head.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megalite.parallel.collectives import max_over, sum_over
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share

IGNORED = -100  # the ignore_index of torch and transformers
LEAST_ROWS = 256  # per chunk on a CPU
LEAST_ROWS_OF_DEVICES = 2048  # per chunk on GPUs, which need larger products
IN_CACHE = 2**18  # logits that a CPU processes at a time: 1 MiB in fp32
AT_A_TIME_ON_DEVICES = 2**26  # logits that other devices process at a time: 256 MiB in fp32
ROW_BYTES = 16  # on other devices, each row of logits begins at a multiple of this
PRODUCT_ROWS = 2048  # rows of the weight's gradient that a CPU computes at a time, if the sum has another dtype


def gradient_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients in this file. For fp16 it is fp32, because small probabilities would underflow in fp16
    before the loss scale multiplies them."""
    return torch.float32 if dtype == torch.float16 else dtype


@contextmanager
def _allow_tf32(wanted: bool) -> Iterator[None]:
    """Context manager in which GPUs may compute fp32 products in TF32, several times faster: it has fp32's range, and
    as many mantissa bits as fp16, which the factors come from."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _HeadGradients:
    """Gradients of the sum of losses with respect to hidden states, weight and bias, summed over the chunks; None if
    not needed. Products are in `dtype`, their sums over chunks in fp32."""

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
        """Adds a chunk's contribution. slopes [n, V / t]: gradients of the logits of `chunk` [n, D], which begins at
        row `first` of the hidden states."""
        if self.hidden is not None and self.factor is not None:
            torch.mm(slopes, self.factor, out=self.hidden[first : first + len(chunk)])
        if self.weight is None:
            return
        chunk, transposed = chunk.to(self.dtype), slopes.t()
        if self.weight.dtype == self.dtype:
            self.weight.addmm_(transposed, chunk, beta=0 if first == 0 else 1)
            return
        rows = PRODUCT_ROWS if chunk.device.type == "cpu" else transposed.shape[0]
        for total, part in zip(self.weight.split(rows), transposed.split(rows), strict=True):
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
) -> tuple[Tensor, _HeadGradients]:
    """The sum of losses of hidden [n, D] and labels [n], and its gradients."""
    tokens, size = hidden.shape
    start, _ = share(vocabulary_size, axis)
    columns = -(-vocabulary_size // axis.size)
    width = gradient_type(weight.dtype).itemsize
    rows = chunk_rows(tokens, size, columns, width, hidden.device.type)
    gradients = _HeadGradients(wanted, hidden, weight, -(-tokens // rows))
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
            # In fp32 the gradients have already overwritten the logits.
            if room.wide is not None and any(wanted):
                block.copy_(slopes)
        if any(wanted):
            with _allow_tf32(gradients.raised):
                gradients.add(logits, chunk, first)
    return total, gradients


class _Room:
    """Memory for the logits of one chunk at a time, of at most `rows` rows; columns: of the rank with the most.

    product: logits in the weight's dtype; raised: in the dtype of gradients, if that differs; wide: `step` rows in
    fp32, if gradients are not in fp32.
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
        """chunk weightᵀ + bias, in the dtype of gradients."""
        logits = self.product[: len(chunk)]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        return logits if self.raised is None else self.raised[: len(chunk)].copy_(logits)

    def in_fp32(self, block: Tensor) -> Tensor:
        """The block itself if it is fp32, else a copy in fp32."""
        return block if self.wide is None else self.wide[: len(block)].copy_(block)


def _rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for logits [rows, columns], aligned for matrix products."""
    length = row_length(columns, dtype.itemsize, like.device.type)
    return like.new_empty(rows, length, dtype=dtype)[:, :columns]


def row_length(columns: int, width: int, device: str) -> int:
    """The stride between rows of logits, in elements of `width` bytes. With an odd vocabulary, such as GPT-2's, or an
    uneven slice of one, contiguous rows are not aligned, and kernels on a GPU would load only a few bytes at a time."""
    unit = 1 if device == "cpu" else ROW_BYTES // width
    return -(-columns // unit) * unit


def block_rows(rows: int, columns: int, ranks: int, device: str) -> int:
    """Rows of a chunk's logits to process at a time in fp32. A CPU makes several passes over the logits, so a block
    should fit into its cache. With a split vocabulary each block costs messages, so a CPU then takes a whole chunk.
    columns: as in `chunk_rows`, so that all ranks cut the same blocks; ranks: size of the axis."""
    if device != "cpu":
        return max(1, min(rows, AT_A_TIME_ON_DEVICES // columns))
    return max(1, min(rows, IN_CACHE // columns) if ranks == 1 else rows)


class _HeadLoss(torch.autograd.Function):
    """The sum of losses; its gradients are computed in forward."""

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
        # In place, so that a second backward raises: autograd detects that a saved tensor has changed.
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(
            None if value is None else value.mul_(grads[0]).to(dtype) for value, dtype in made
        ), *[None] * 6


def _rows_that_count(labels: Tensor) -> Tensor | None:
    """Indices of the labels that count; None: all rows are computed. On a GPU, finding their number would need a
    synchronization, so all rows are computed unless the caller passes the indices."""
    if labels.device.type != "cpu":
        return None
    counted = (labels != IGNORED).nonzero().squeeze(-1)
    return None if len(counted) == len(labels) else counted


def _losses_and_slopes(
    logits: Tensor, labels: Tensor, start: int, axis: Axis, z_loss: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Losses [n] of tokens and d loss / d logits [n, V / t], which overwrites the logits (fp32)."""
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
    """Number of tokens per chunk. tokens: all hidden states; size: their features; width: bytes of a number; device:
    its type.

    A chunk's logits take no more bytes than the fp32 gradient of the weight [V / t, D], to which each chunk adds, or
    than the hidden states, whichever is larger; but at least LEAST_ROWS rows, since products of few rows are slow.
    Chunks are of nearly equal size. columns: the largest share of the vocabulary on the axis, so that all ranks cut the
    same chunks, whose sums they exchange.
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

    hidden [..., D], after `enter`; weight [V / t, D]; logits are hidden weightᵀ + bias; labels [...] int64 in [0, V)
    or -100. z_loss: weight of the squared log of the sum of exponentials, which is part of the loss only if gradients
    are needed, not in evaluation. counted [n] int64: indices of the labels that count, in flattened order, if the
    caller knows them; nothing is computed for the others. Gradients of weight and bias are fp32 sums over the chunks.
    Backward can be called once.
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    enabled = torch.is_grad_enabled()
    wanted = tuple(
        enabled and value is not None and value.requires_grad for value in (hidden, weight, bias)
    )
    return _HeadLoss.apply(
        flat, weight, bias, labels, vocabulary_size, axis, z_loss, wanted, counted
    )  # type: ignore[return-value]
