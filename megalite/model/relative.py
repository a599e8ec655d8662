"""T5's relative position bias (arXiv 1910.10683, section 2.1): a number per head and distance of two tokens, added to
the attention scores. The layers of a stack share one table, so the bias is computed once for all layers of a chunk; it
is minus infinity for keys that are masked.

Every stage of a pipeline holds both tables, the encoder's and the decoder's, as copies of one parameter, and their
gradients are summed over the stages. A stage without a layer that reads a table contributes zeros (`taking_part`).

Shapes: B batch, N heads, S queries, T keys, H head size; `/ t` marks a dim that the tensor axis splits. Next:
attention.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.context import Context
from megalite.model.spec import TransformerSpec
from megalite.parallel.deferred import later
from megalite.parallel.grid import Axis
from megalite.parallel.layers import parameter

ENCODER, DECODER, CROSS = "encoder bias", "decoder bias", "cross bias"
"""Keys of the biases in a context's `shared`."""


def bias_key(causal: bool) -> str:
    """The key for self-attention in the decoder (causal) or the encoder."""
    return DECODER if causal else ENCODER


def buckets_of(distances: Tensor, causal: bool, buckets: int, most: int) -> Tensor:
    """The row of the table for each distance (key position minus query position), int64, shape of `distances`.

    Half of the buckets are for one distance each, the others for ranges that grow logarithmically up to `most`; in an
    encoder one half of the table is for earlier keys and the other for later keys.
    """
    if causal:
        base, distances = torch.zeros_like(distances), (-distances).clamp(min=0)
    else:
        buckets //= 2
        base, distances = (distances > 0).long() * buckets, distances.abs()
    exact = buckets // 2
    # In fp32 and in the same order as transformers: at the borders of ranges the result depends on rounding.
    far = torch.log(distances.float() / exact) / math.log(most / exact) * (buckets - exact)
    far = (exact + far.clamp(min=0, max=buckets).long()).clamp(max=buckets - 1)
    return base + torch.where(distances < exact, distances, far)


class RelativeBias(nn.Module):
    """The table of a stack, [buckets, N] with the heads split; computes the bias of its layers' scores."""

    def __init__(self, spec: TransformerSpec, axis: Axis, causal: bool) -> None:
        super().__init__()
        assert spec.stacks is not None
        self.stacks, self.causal = spec.stacks, causal
        shape = self.stacks.buckets, spec.num_heads
        self.weight = parameter(shape, 1, axis, spec.std_of(spec.hidden_size))

    def forward(self, s: int, t: int, visible: Tensor | None, device: torch.device) -> Tensor:
        """The bias [1 or B, N / t, S, T] for the last S of T positions. visible [B, 1, 1, T] bool: unmasked keys."""
        queries, keys = torch.arange(t - s, t, device=device), torch.arange(t, device=device)
        distances = keys - queries.unsqueeze(-1)
        rows = buckets_of(distances, self.causal, self.stacks.buckets, self.stacks.max_distance)
        bias = F.embedding(rows, later(self.weight)).permute(2, 0, 1).contiguous().unsqueeze(0)
        hidden = (distances > 0)[None, None] if self.causal else None
        if visible is not None:
            hidden = ~visible if hidden is None else hidden | ~visible
        return bias if hidden is None else bias.masked_fill(hidden, -torch.inf)


def source_visible(context: Context) -> Tensor | None:
    """The source tokens that may be attended to, bool [B, 1, 1, source]; None: all."""
    if context.source_visible is not None or context.documents is None:
        return context.source_visible
    documents = context.documents[:, : context.source]
    return (documents == documents[:, :1])[:, None, None]


def cross_bias(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask of cross-attention as a bias of its scores, [B, 1, 1, source]; None: no mask."""
    if visible is None:
        return None
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -torch.inf)


def attend_biased(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    drops: Tensor | None,
    rate: float,
) -> Tensor:
    """softmax(query keyᵀ + bias) value, without scaling. query [B, N / t, S, H]; key, value [B, N / t, T, H]; bias as
    above; drops [B, N / t, S, T] bool: attention weights to drop. The result has the shape of query."""
    # The CPU's kernels compute no gradient of the bias, and torch's fallback stores every score twice.
    if drops is None and not (
        query.device.type == "cpu" and bias is not None and bias.requires_grad
    ):
        return F.scaled_dot_product_attention(query, key, value, bias, scale=1.0)
    scores = query @ key.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights if drops is None else weights.masked_fill(drops, 0.0) / (1 - rate)) @ value


class _TakingPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.dtype) for weight in weights]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (grads[0].new_zeros(shape, dtype=dtype) for shape, dtype in ctx.like)
        return grads[0], *zeros


def taking_part(hidden: Tensor, tables: Sequence[RelativeBias]) -> Tensor:
    """Returns the hidden states; in backward the tables get zero gradients. ZeRO reduces only parameters with a
    gradient, and stages sum theirs: a stage without one would leave the others waiting."""
    weights = [later(table.weight) for table in tables]
    return _TakingPart.apply(hidden, *weights) if weights else hidden  # type: ignore[return-value]
