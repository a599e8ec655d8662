"""Causal attention of the two runs of tokens that a rank of the context axis holds, without a mask.

A run attends to all tokens before it and causally to itself (a lower-right causal mask). GPUs have kernels for that.
The CPU's kernel supports only the upper-left causal mask, so there a run takes two calls, for the keys before it and
for its own, whose results are merged by their log-sum-exps (online softmax, arXiv 1805.02867).

Shapes: B batch, N heads, K key/value heads, S sequence, H head size; c ranks of the context axis.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.model.varlen import takes_groups
from megalite.parallel.rows import Rows

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_runs(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """Causal softmax(query keyᵀ / √H) value. query [B, N, S / c, H] of this rank's tokens; key, value [B, K, S, H] of
    all tokens; the result has the shape of query and the memory layout [B, S / c, N, H]."""
    if query.device.type in ("cpu", "meta"):  # meta: in a dry run
        return _CausalRuns.apply(query, key, value, rows)  # type: ignore[return-value]
    return by_run(query, key, value, rows)


def by_run(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """`attend_runs` with one call of scaled_dot_product_attention for each run."""
    # Imported here because it imports torch._dynamo, FSDP and DTensor, which would add a second to each rank's start.
    from torch.nn.attention.bias import causal_lower_right

    grouped, mixed = query.shape[1] != key.shape[1], list[Tensor]()
    if grouped and not takes_groups(query, None):
        count, grouped = query.shape[1] // key.shape[1], False
        key, value = key.repeat_interleave(count, dim=1), value.repeat_interleave(count, dim=1)
    for part, run in zip(query.chunk(2, dim=2), rows.runs, strict=True):
        seen_keys, seen_values = key[:, :, : run.stop], value[:, :, : run.stop]
        corner: Any = causal_lower_right(len(run), run.stop)
        result = F.scaled_dot_product_attention(
            part, seen_keys, seen_values, corner, enable_gqa=grouped
        )
        mixed.append(result.transpose(1, 2))
    return torch.cat(mixed, dim=1).transpose(1, 2)


def _blocks(run: range) -> Iterator[tuple[slice, bool]]:
    """The keys that a run attends to, and whether causally: all before it, then its own."""
    if run.start > 0:
        yield slice(0, run.start), False
    yield slice(run.start, run.stop), True


class _CausalRuns(torch.autograd.Function):
    """Saves what one call of the kernel saves: its inputs, the result and a log-sum-exp for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
        b, n, s, h = query.shape
        mixed = query.new_empty(b, s, n, h).transpose(1, 2)
        logs = query.new_empty(b, s, n, dtype=torch.float32).transpose(1, 2)
        for number, run in enumerate(rows.runs):
            here = slice(number * len(run), (number + 1) * len(run))
            mixed[:, :, here], logs[:, :, here] = _of_run(query[:, :, here], key, value, run)
        ctx.save_for_backward(query, key, value, mixed, logs)
        ctx.rows = rows
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, logs = ctx.saved_tensors
        slope = grads[0]
        of_query = torch.zeros_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        for number, run in enumerate(ctx.rows.runs):
            here = slice(number * len(run), (number + 1) * len(run))
            own = [x[:, :, here] for x in (slope, query, mixed, logs)]
            for seen, causal in _blocks(run):
                # Given the result and log-sum-exps over all keys, the kernel returns this block's part of the gradient.
                part = _backward(
                    own[0], own[1], key[:, :, seen], value[:, :, seen], own[2], own[3], 0.0, causal
                )
                of_query[:, :, here] += part[0]
                of_key[:, :, seen] += part[1]
                of_value[:, :, seen] += part[2]
        return of_query, of_key, of_value, None


def _of_run(query: Tensor, key: Tensor, value: Tensor, run: range) -> tuple[Tensor, Tensor]:
    """The result for one run [B, N, p, H], and its log-sum-exps [B, N, p]."""
    (mixed, logs), *others = (
        _forward(query, key[:, :, seen], value[:, :, seen], 0.0, causal)
        for seen, causal in _blocks(run)
    )
    for other, other_logs in others:
        share = torch.sigmoid(other_logs - logs).unsqueeze(-1)
        mixed = torch.lerp(mixed.float(), other.float(), share).to(query.dtype)
        logs = torch.logaddexp(logs, other_logs)
    return mixed, logs
