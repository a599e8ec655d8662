"""Which samples an evaluation of a run takes (megalite/training/evaluation.py)."""

from types import SimpleNamespace
from typing import Any

import pytest

from megalite.training.evaluation import Validation


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (4, [("a:0", range(24)), ("b", range(100, 108)), ("a:2", range(108, 109))]),
        (1, [("a:0", range(6)), ("b", range(100, 102)), ("a:2", range(108, 109))]),
        ("all", [("a:0", range(100)), ("b", range(100, 108)), ("a:2", range(108, 111))]),
    ],
)
def test_samples_are_taken_in_proportion_or_all(steps: Any, wanted: list[Any]) -> None:
    """Of each corpus at least one sample, and at most those that it has; an empty one is left out."""
    corpora = [("a", range(100)), ("b", range(100, 108)), ("a", range(108, 111)), ("c", range(0))]
    config: Any = SimpleNamespace(
        train=SimpleNamespace(eval_steps=steps),
        train_batch_size=8,
        data=SimpleNamespace(valid=[SimpleNamespace(weight=w) for w in (3.0, 1.0, 0.0, 0.0)]),
    )
    data: Any = SimpleNamespace(corpora=corpora)
    taken = Validation(config, data, None, print)._taken()  # type: ignore[arg-type]
    assert taken == wanted
