"""Attention of the runs of tokens on a context rank, compared with attention of all tokens."""

from itertools import pairwise, product
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

import megalite.model.attention as attention
from megalite.model import runs
from megalite.model.context import Context
from megalite.model.runs import attend_runs, by_run
from megalite.model.varlen import runs_as_pieces
from megalite.parallel.grid import Axis
from megalite.parallel.rows import Rows

B, N, H, S = 2, 6, 8, 48
SIZES = (2, 3, 4)


def rows(size: int, rank: int, length: int = S) -> Rows:
    return Rows(Axis(size, rank, tuple(range(size)), None), length)


@pytest.mark.parametrize("calls", ["of CPUs", "of GPUs", "of GPUs without groups"])
@pytest.mark.parametrize(("size", "key_heads"), product(SIZES, (6, 2, 1)))
def test_runs_equal_attention_of_the_whole_sample(
    size: int, key_heads: int, calls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result and gradients. The calls that GPUs get use a mask here."""
    repeated = mock.Mock(side_effect=Tensor.repeat_interleave)
    if calls == "of GPUs without groups":
        monkeypatch.setattr(runs, "takes_groups", lambda query, visible: False)
        monkeypatch.setattr(Tensor, "repeat_interleave", lambda *args, **kw: repeated(*args, **kw))
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int) -> torch.Tensor:
        values = torch.randn(B, S, heads, H, generator=generator)
        return values.transpose(1, 2).requires_grad_()

    query, key, value = draw(N), draw(key_heads), draw(key_heads)
    whole = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    slope = torch.randn(whole.shape, generator=generator)
    wanted = torch.autograd.grad(whole, (query, key, value), slope)
    found = [torch.zeros_like(value) for value in wanted]
    for rank in range(size):
        own, attend = rows(size, rank), attend_runs if calls == "of CPUs" else by_run
        mixed = attend(own.cut(query, 2), key, value, own)
        torch.testing.assert_close(mixed, own.cut(whole, 2), rtol=1e-5, atol=1e-6)
        assert mixed.transpose(1, 2).is_contiguous()
        slopes = torch.autograd.grad(mixed, (query, key, value), own.cut(slope, 2))
        for total, part in zip(found, slopes, strict=True):
            total += part
    assert repeated.called == (calls == "of GPUs without groups" and key_heads < N)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_runs_in_16_bits_differ_by_rounding() -> None:
    query, key, value = (torch.randn(B, N, S, H) for _ in range(3))
    whole = scaled_dot_product_attention(query, key, value, is_causal=True)
    for rank in range(2):
        own = rows(2, rank)
        narrow = [x.bfloat16() for x in (own.cut(query, 2), key, value)]
        mixed = attend_runs(narrow[0], narrow[1], narrow[2], own)
        assert mixed.dtype == torch.bfloat16
        assert (mixed.float() - own.cut(whole, 2)).abs().max() < 0.05


def lower_right(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    longest_queries: int,
    longest_keys: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch's varlen_attn with fewer queries than keys, aligned at their ends as in flash attention."""
    left, right = window_size
    assert right == 0 and queries.dtype == keys.dtype == torch.int32
    result = torch.zeros_like(query)
    bounds = [list(pairwise(starts.tolist())) for starts in (queries, keys)]
    for (start, stop), (first, last) in zip(*bounds, strict=True):
        assert 0 < stop - start <= longest_queries and stop - start <= last - first <= longest_keys
        ahead = torch.arange(last - first) - torch.arange(stop - start).unsqueeze(1)
        ahead = ahead - (last - first - stop + start)
        seen = (ahead <= 0) & ((left < 0) | (-ahead <= left))
        parts = query[start:stop], key[first:last], value[first:last]
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
        mixed = scaled_dot_product_attention(q, k, v, seen, enable_gqa=enable_gqa)
        result[start:stop] = mixed[0].transpose(0, 1)
    return result


@pytest.mark.parametrize(
    ("window", "packed"), [(None, True), (5, True), (1, True), (7, False), (S, True)]
)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_for_pieces_equals_a_mask(
    size: int, window: int | None, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(size)
    documents = np.cumsum(random.random((B, S)) < 0.15, axis=1)
    documents[0, 5:] = 99  # a document of nearly all tokens
    query, key, value = (
        torch.randn(B, heads, S, H, dtype=torch.float64, requires_grad=True) for heads in (N, 2, 2)
    )
    for rank in range(size):
        own = rows(size, rank)
        context = Context(rows=own)
        if packed:
            context.documents = torch.from_numpy(documents)
            context.run_pieces = runs_as_pieces(documents, own.runs)
        found = []
        for has_kernel in (False, True):
            monkeypatch.setattr(attention, "kernel_takes", lambda *args, has=has_kernel: has)
            monkeypatch.setattr(attention, "new_enough", lambda device: True)
            monkeypatch.setattr(varlen, "varlen_attn", lower_right)
            context.shared.clear()
            mixed = attention.attend(
                own.cut(query, 2), key, value, context, window, True, None, 0.0
            )
            slopes = torch.autograd.grad(mixed.square().sum(), (query, key, value))
            found.append([mixed.detach(), *slopes])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
