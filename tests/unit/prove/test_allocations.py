"""The peak of torch's allocations (megalite/prove/allocations.py)."""

import torch

from megalite.prove.allocations import peak_bytes

NUMBERS = 10**6


def test_what_is_held_at_once_counts_and_what_came_before_does_not() -> None:
    standing = torch.ones(NUMBERS)

    def work() -> None:
        for _ in range(3):  # one after another
            standing.add(1).add_(1)

    assert 4 * NUMBERS <= peak_bytes(work) < 4.1 * NUMBERS

    def more() -> torch.Tensor:
        one, other = standing + 1, standing + 2
        return (one * other).sum()

    assert 12 * NUMBERS <= peak_bytes(more) < 12.1 * NUMBERS
