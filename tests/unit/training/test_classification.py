"""Accuracy and macro F1, with their confidence intervals."""

import numpy as np
import pytest

from megalite.training.classification import f1, figures, wilson


def test_figures_of_a_table_worked_by_hand() -> None:
    table = np.array([[8, 2, 0], [1, 5, 4], [0, 0, 0]])
    found = figures(table.flatten().tolist(), ["a", "b", "c"])
    # a: 2·8 / (10 + 9); b: 2·5 / (10 + 7); c: no text, and 4 answers.
    assert found["f1_by_label"] == pytest.approx({"a": 16 / 19, "b": 10 / 17, "c": 0.0})
    assert found["macro_f1"] == pytest.approx((16 / 19 + 10 / 17) / 3)
    assert (found["accuracy"], found["commonest"], found["texts"]) == (13 / 20, 0.5, 20)


def test_wilsons_interval_is_that_of_the_tables() -> None:
    """Newcombe (Statistics in Medicine 17, 1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, texts, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, texts) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_macro_f1_covers_other_samples() -> None:
    """For tables drawn from known probabilities, about 95 % of the intervals contain the F1 of these probabilities."""
    chances = np.array([[0.3, 0.1], [0.15, 0.45]])
    true, random, held = f1(chances * 1e6).mean(), np.random.default_rng(1), 0
    for _ in range(100):
        counts = random.multinomial(300, chances.flatten()).tolist()
        low, high = figures(counts, ["a", "b"])["macro_f1_interval"]
        held += low <= true <= high
    assert 88 <= held <= 99
