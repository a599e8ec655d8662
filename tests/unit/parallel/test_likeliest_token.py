"""The likeliest token of split logits (megalite/parallel/likeliest_token.py); the ranks are simulated in turn."""

import pytest
import torch
from torch import Tensor

import megalite.parallel.likeliest_token as over
from megalite.parallel.grid import ALONE, Axis
from megalite.parallel.layers import share

VOCABULARY = 11


def by_ranks(logits: Tensor, size: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Each rank's candidate from its share."""
    axes = [Axis(size, rank, tuple(range(size)), None) for rank in range(size)]
    parts = [logits[..., slice(*share(VOCABULARY, axis))] for axis in axes]
    sent: list[Tensor] = []

    def keep(pair: Tensor, axis: Axis) -> Tensor:
        sent.append(pair)
        return pair.unsqueeze(0)

    monkeypatch.setattr(over, "gather_over", keep)
    for part, axis in zip(parts, axes, strict=True):
        over.likeliest_token(part, VOCABULARY, axis)
    everyone = torch.stack(sent)
    monkeypatch.setattr(over, "gather_over", lambda pair, axis: everyone)
    return [
        over.likeliest_token(part, VOCABULARY, axis) for part, axis in zip(parts, axes, strict=True)
    ]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_finds_the_token_of_the_whole(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for found in by_ranks(logits, size, monkeypatch):
        assert found.dtype == torch.int64 and torch.equal(found, logits.argmax(-1))


def test_the_lowest_of_equally_likely_ids_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [4, 5, 9]] = 1.0
    assert over.likeliest_token(logits, VOCABULARY, ALONE).tolist() == [4]
    for size in (2, 3):
        assert [found.tolist() for found in by_ranks(logits, size, monkeypatch)] == [[4]] * size


def test_ids_beyond_the_exact_numbers_of_fp16_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 100_001, dtype=torch.float16)
    logits[0, 99_999] = 1.0
    assert over.likeliest_token(logits, 100_001, ALONE).tolist() == [99_999]
