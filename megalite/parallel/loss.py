"""Cross entropy over a vocabulary that the tensor axis splits: no rank ever holds a whole row of logits.

Each rank has the logits of its ids; the maximum, the sum of exponentials and the label's logit are three
numbers a token that cross the axis. The product with the head's weight is part of it, in chunks of tokens.
Next: pipeline.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.parallel.collectives import max_over, sum_over
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share

LEAST_ROWS = 256  # of a chunk
IGNORED = -100  # torch's and transformers' label for "does not count"


class _HeadLoss(torch.autograd.Function):
    """Sums the losses chunk by chunk and, where gradients are wanted, makes them in the same pass: logits are made
    once, and no more of them than a chunk's ever stands in memory."""

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
        rows: int,
    ) -> Tensor:
        start, _ = share(vocabulary_size, axis)
        wanted = any(ctx.needs_input_grad[:3])
        # fp16 has no room for small probabilities, whose gradients the loss scale has not raised yet.
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wanted else None
        weight_slope = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if wanted else None
        bias_slope = torch.zeros(weight.shape[0], dtype=torch.float32, device=hidden.device) if wanted else None
        for first in range(0, hidden.shape[0], rows):
            chunk, chunk_labels = hidden[first : first + rows], labels[first : first + rows]
            logits = F.linear(chunk, weight, bias).float()
            losses, slope = _losses_and_slope(logits, chunk_labels, start, axis, z_loss, wanted)
            total += losses.sum()
            if slopes is not None and weight_slope is not None and bias_slope is not None:
                bias_slope += slope.sum(dim=0)
                slope = slope.to(dtype)
                slopes[first : first + rows] = slope @ weight.to(dtype)
                weight_slope += slope.t() @ chunk.to(dtype)
        if wanted:
            ctx.save_for_backward(slopes, weight_slope, bias_slope if bias is not None else None)
            ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes, weight_slope, bias_slope = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        bias = None if bias_slope is None else (bias_slope * grads[0]).to(weight_dtype)
        return (
            (slopes * grads[0]).to(hidden_dtype),
            (weight_slope * grads[0]).to(weight_dtype),
            bias,
            *[None] * 5,
        )


def _losses_and_slope(
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
        exponentials.scatter_add_(-1, columns, -(here & counts).to(exponentials.dtype).unsqueeze(-1))
    return losses.masked_fill(~counts, 0.0), exponentials


def token_losses(logits: Tensor, labels: Tensor, vocabulary_size: int, axis: Axis) -> Tensor:
    """Losses [n] of tokens in nats, fp32, the same on every rank of the axis; without autograd. logits [n, V / t],
    fp32, are overwritten; labels [n] as in `head_loss`."""
    start, _ = share(vocabulary_size, axis)
    return _losses_and_slope(logits, labels, start, axis, 0.0, wanted=False)[0]


def chunk_rows(tokens: int, size: int, columns: int) -> int:
    """Tokens of a chunk of `tokens` hidden states of `size` numbers.

    Each chunk adds a whole [V / t, D] product to the weight's gradient: below D rows its logits would be smaller than
    what it adds to, and below 256 matrix products are slow. Beyond that its logits take no more numbers than the hidden
    states. columns: of the axis's largest share of the vocabulary, so that all ranks cut the same chunks, whose
    sums they exchange.
    """
    return max(1, min(tokens, max(LEAST_ROWS, size, tokens * size // columns)))


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    vocabulary_size: int,
    axis: Axis,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum (not mean) of the losses of the tokens that count, in nats, fp32, the same on every rank of the axis.

    hidden [..., D], `enter`ed; weight [V / t, D]; logits are hidden weightᵀ + bias; labels [...] int64 in [0, V)
    or -100. z_loss: weight of the squared log of the sum of exponentials, part of
    the loss where gradients are wanted, and not in evaluation. Gradients are fp32 sums over the chunks.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens, size = flat.shape
    rows = chunk_rows(tokens, size, -(-vocabulary_size // axis.size))
    return _HeadLoss.apply(flat, weight, bias, labels.reshape(-1), vocabulary_size, axis, z_loss, rows)  # type: ignore[return-value]
