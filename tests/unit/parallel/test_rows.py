"""The rows of a sample on each rank of the context axis (megalite/parallel/rows.py)."""

import pytest
import torch

from megalite.parallel.rows import _joined, _parted, runs_of
from tests.unit.model.test_runs import SIZES, B, H, S, rows


@pytest.mark.parametrize("size", SIZES)
def test_the_runs_of_all_ranks_are_the_sample(size: int) -> None:
    held = [token for rank in range(size) for run in runs_of(S, size, rank) for token in run]
    assert sorted(held) == list(range(S))
    for rank in range(size):
        own = [token for run in runs_of(S, size, rank) for token in run]
        assert rows(size, rank).index(torch.device("cpu")).tolist() == own
        assert rows(size, rank).cut(torch.arange(S), 0).tolist() == own


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_as_many_pairs_of_a_causal_mask(size: int) -> None:
    pairs = {
        sum(token + 1 for run in runs_of(S, size, rank) for token in run) for rank in range(size)
    }
    assert len(pairs) == 1


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_joined_in_the_order_of_the_tokens(size: int) -> None:
    whole = torch.randn(2, B, S, H)
    parts = torch.stack([rows(size, rank).cut(whole, 2) for rank in range(size)])
    assert torch.equal(_joined(parts), whole)
    assert torch.equal(_parted(whole, size), parts)
