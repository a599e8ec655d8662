"""Shares of attention's work on the ranks of a context axis (megalite/plan/balance.py)."""

from dataclasses import replace

import numpy as np
import pytest

from megalite.model.families import read_spec
from megalite.parallel.rows import runs_of
from megalite.plan.balance import shares
from tests.small_models import MODELS
from tests.unit.model.test_runs import SIZES, S


def pairs_by_hand(documents: list[int], window: int, causal: bool, own: list[int]) -> int:
    every = range(len(documents))
    return sum(
        documents[one] == documents[other]
        and abs(one - other) < window
        and (other <= one or not causal)
        for one in own
        for other in every
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_shares_of_attention_with_documents(causal: bool, window: int | None) -> None:
    documents = [0] * 7 + [1] * 2 + [2] * 20 + [3] * 1 + [4] * 18
    spec = replace(read_spec(MODELS["llama"]), causal=causal, windows=(window, None, None, None))
    found = shares(spec, np.array([documents]), 3)
    work = []
    for rank in range(3):
        own = [token for run in runs_of(S, 3, rank) for token in run]
        work.append(
            pairs_by_hand(documents, window or S, causal, own)
            + 3 * pairs_by_hand(documents, S, causal, own)
        )
    assert found == pytest.approx([3 * one / sum(work) for one in work])


@pytest.mark.parametrize("size", SIZES)
def test_a_causal_mask_alone_is_shared_evenly(size: int) -> None:
    spec = read_spec(MODELS["llama"])
    assert shares(spec, np.zeros((1, S), int), size) == pytest.approx([1.0] * size)
