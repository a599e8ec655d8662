"""Attention: computes queries, keys and values and attends under the mask of the context.

Shapes as in mlp.py. Next: block.py.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from megalite.model.context import Context
from megalite.model.dropout import dropped
from megalite.model.norms import Norm, SplitNorm
from megalite.model.relative import CROSS, attend_biased, bias_key
from megalite.model.rotary import rotate, spread, turns
from megalite.model.runs import attend_runs
from megalite.model.spec import TransformerSpec
from megalite.model.varlen import (
    attend_pieces,
    attend_prefixes,
    attend_runs_in_pieces,
    kernel_takes,
    new_enough,
    takes_groups,
)
from megalite.parallel.collectives import Split
from megalite.parallel.columns import columns
from megalite.parallel.layers import ColumnLinear, RowLinear, share
from megalite.parallel.rows import gather_rows, to_heads, to_rows


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Context,
    window: int | None,
    causal: bool,
    drops: Tensor | None,
    rate: float,
) -> Tensor:
    """softmax(query keyᵀ / √H) value with the fastest kernel: flash attention for causal attention, windows and
    documents if the device supports it, else a kernel with a mask; with dropout, explicit matrix products. With
    `context.rows` the queries are those of this rank's tokens and the keys those of whole samples.

    query [B, N / t, S, H]; key, value [B, K / t, T, H]; drops [B, N / t, S, T] bool: attention weights to drop. The
    result has the shape of query. window and causal: as in `Context.mask`.
    """
    s, t = query.shape[2], key.shape[2]
    if drops is None:
        mixed = _attend_without_mask(query, key, value, context, window, causal)
        if mixed is not None:
            return mixed
    visible = context.mask(window, s, t, query.device, causal)
    grouped = query.shape[1] != key.shape[1]
    if drops is None and grouped and not takes_groups(query, visible):
        return attend_by_group(query, key, value, visible, causal)
    if drops is None:
        return F.scaled_dot_product_attention(
            query, key, value, visible, is_causal=causal and visible is None, enable_gqa=grouped
        )
    if grouped:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    if visible is None and causal:
        visible = torch.ones(drops.shape[-2:], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights.masked_fill(drops, 0.0) / (1 - rate) @ value


def attend_by_group(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, causal: bool
) -> Tensor:
    """Attention by a kernel for equally many heads. A single query per head, in generation: the heads that share a key
    head become queries of it, so that no key is copied. Otherwise each gets a copy of its keys. visible: bool [B or 1,
    1, S, T]; None: no mask, or a causal one. Others as in `attend`."""
    count, s = query.shape[1] // key.shape[1], query.shape[2]
    if s > 1 or visible is None:
        key, value = key.repeat_interleave(count, dim=1), value.repeat_interleave(count, dim=1)
        is_causal = causal and visible is None
        return F.scaled_dot_product_attention(query, key, value, visible, is_causal=is_causal)
    rows = query.unflatten(1, (-1, count)).squeeze(3)  # [B, K, N / K, H]
    mixed = F.scaled_dot_product_attention(rows, key, value, visible.expand(-1, -1, count, -1))
    return mixed.flatten(1, 2).unsqueeze(2)


def _attend_without_mask(
    query: Tensor, key: Tensor, value: Tensor, context: Context, window: int | None, causal: bool
) -> Tensor | None:
    """Attention by a kernel that supports documents, prefixes, windows and runs of tokens; None if there is none for
    this case."""
    b, _, s, h = query.shape
    device, rows, prefixes = query.device, context.rows, context.prefixes
    narrow = window is not None and window < key.shape[2]
    if context.documents is None and prefixes is None and not narrow:
        return attend_runs(query, key, value, rows) if causal and rows is not None else None
    takes = kernel_takes(device.type, query.dtype, h) and new_enough(device)
    if not takes or (rows is not None and not causal):
        return None
    if rows is not None:
        runs = context.pieces_of_runs(b, device)
        return None if runs is None else attend_runs_in_pieces(query, key, value, runs, window)
    pieces, halves = context.pieces(b, s, device), context.halves
    if pieces is None:
        return None
    if prefixes is None:
        return attend_pieces(query, key, value, pieces, window, causal)
    if halves is None:
        return None
    return attend_prefixes(query, key, value, pieces, halves, prefixes, window)


class Attention(nn.Module):
    """Self-attention with heads split over the tensor axis; grouped-query attention if K < N (arXiv 2305.13245).

    If K < t, each rank holds the one key/value head that its queries use, the same as its neighbours' copies.
    """

    def __init__(self, spec: TransformerSpec, layer: int, split: Split, recompute: bool) -> None:
        super().__init__()
        axis = split.axis
        self.split = split
        self.layer = layer
        self.rotary = spec.rotary_of(layer)
        self.head_size = spec.head_size
        self.window = spec.window(layer)
        self.qk_norm = spec.qk_norm
        self.dropout = spec.attention_dropout
        self.causal = spec.is_causal(layer)
        self.recompute = recompute
        self.heads = range(*share(spec.num_heads, axis))
        self.name = f"layers.{layer}.attention"
        self.bias_key = bias_key(self.causal) if spec.stacks is not None else None
        d = spec.hidden_size
        h = spec.head_size
        bias = spec.attention_bias
        std = spec.std_of(spec.hidden_size)
        queries, keys = spec.num_heads * h, spec.num_kv_heads * h
        out_std = spec.scaled_by_depth(spec.std_of(queries))
        query_std = std if spec.scaled_scores else std / math.sqrt(h)
        self.query = ColumnLinear(d, queries, bias, axis, query_std, unit=h)
        self.key = ColumnLinear(d, keys, bias, axis, std, unit=h)
        self.value = ColumnLinear(d, keys, bias, axis, std, unit=h)
        self.output = RowLinear(queries, d, spec.attention_output_bias, split, out_std)
        if spec.qk_norm == "head":
            self.query_norm, self.key_norm = (Norm(spec, axis, h, users=axis) for _ in range(2))
        elif spec.qk_norm == "projection":
            self.query_norm, self.key_norm = (
                SplitNorm(spec, axis, size) for size in (queries, keys)
            )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        query, key, value = columns(x, (self.query, self.key, self.value), self.split)
        if self.rotary is not None and self.qk_norm == "none":
            value = value.contiguous()  # a view would keep the memory of all three alive
        value = self._heads(value).transpose(1, 2)
        if self.qk_norm == "projection":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = self._heads(query), self._heads(key)
        if self.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = self._turn(query.transpose(1, 2), key.transpose(1, 2), context)
        if context.cache is not None and self.causal:  # an encoder sees the whole source at once
            key, value = context.cache.extend(self.layer, key, value)
        return self._result(query, key, value, context)

    def _result(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """[B, heads, S or T, H] of each -> [B, S, D]."""
        if self.recompute and torch.is_grad_enabled():
            mixed = torch.utils.checkpoint.checkpoint(
                self._core,
                query,
                key,
                value,
                context,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            mixed = self._core(query, key, value, context)
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, S, N H / t] -> [B, S, D]

    def _core(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """Core attention. With a context axis, keys are gathered here, so that `selective` recompute stores only this
        rank's part of them."""
        rows = context.rows
        if rows is None:
            return self._mix(query, key, value, context, self.heads)
        if not rows.by_heads:
            key, value = gather_rows(key, value, rows)
            return self._mix(query, key, value, context, self.heads)
        query, key, value = to_heads(query, key, value, rows)
        count = query.shape[1]
        heads = self.heads[rows.axis.rank * count : (rows.axis.rank + 1) * count]
        mixed = self._mix(query, key, value, replace(context, rows=None), heads)
        return to_rows(mixed, rows)

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, heads: range
    ) -> Tensor:
        """Attention of these heads."""
        s, t = query.shape[2], key.shape[2]
        drops = None
        if context.randomness is not None and self.dropout > 0:
            rows = context.row_numbers(range(s), query.device)
            drops = dropped(context.randomness, self.name, self.dropout, [heads, rows, range(t)])
        if self.bias_key is not None:
            bias = context.shared[self.bias_key][0]
            return attend_biased(query, key, value, bias, drops, self.dropout)
        return attend(query, key, value, context, self.window, self.causal, drops, self.dropout)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads · H] -> [B, S, heads, H]"""
        return x.unflatten(-1, (-1, self.head_size))

    def _turn(self, query: Tensor, key: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Applies rotary embeddings; layers with the same `Rotary` share the angles."""
        if self.rotary is None:
            return query, key
        interleaved, key_of_turns = self.rotary.interleaved, ("turns", self.rotary)
        if key_of_turns not in context.shared:
            s, device = query.shape[2], query.device
            spans: Tensor | int | None = None
            if self.rotary.scaling == "dynamic":
                known = context.known_span(s)
                spans = context.spans(s, device) if known is None else known
            cosine, sine = turns(
                self.rotary, context.token_positions(s, device), spans, query.dtype
            )
            context.shared[key_of_turns] = spread(cosine, interleaved), sine
        cosine, sine = context.shared[key_of_turns]
        return rotate(query, cosine, sine, interleaved), rotate(key, cosine, sine, interleaved)


class CrossAttention(Attention):
    """Cross-attention of a decoder layer: its queries attend to all of the encoder's output.

    x [B, S, D] of the target, source [B, T, D] -> [B, S, D]. In generation the source's keys and values are computed
    once.
    """

    def __init__(self, spec: TransformerSpec, layer: int, split: Split, recompute: bool) -> None:
        super().__init__(spec, layer, split, recompute)
        self.name, self.bias_key = f"layers.{layer}.cross_attention", CROSS

    def forward(self, x: Tensor, context: Context, source: Tensor | None = None) -> Tensor:
        assert source is not None
        (query,) = columns(x, (self.query,), self.split)
        query = self._heads(query).transpose(1, 2)
        if context.cache is not None and not source.shape[1]:
            key, value = context.cache.sources[self.layer]
        else:
            key, value = (
                self._heads(part).transpose(1, 2)
                for part in columns(source, (self.key, self.value), self.split)
            )
            if context.cache is not None:
                context.cache.sources[self.layer] = key, value
        return self._result(query, key, value, context)
