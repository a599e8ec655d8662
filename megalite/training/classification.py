"""Figures of a classifier: accuracy and macro F1, each with a confidence interval, from its confusion matrix."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_Z = 1.959964  # two-sided 95 % quantile of the normal distribution
_DRAWS = 1000
_BATCH = 100  # draws at a time, each of N² counts


def figures(counts: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    """counts [N²]: the flattened confusion matrix; rows are labels of texts, columns are answers.

    `accuracy`: the share of right answers, with Wilson's 95 % interval (J. Am. Stat. Assoc. 22, 1927). `macro_f1`: the
    mean over labels of F1 = 2 · right / (texts of the label + answers that name it), with the 95 % interval of a
    bootstrap (samples with replacement, from a fixed seed). `commonest`: the accuracy of always answering with the
    commonest label.
    """
    table = np.rint(counts).astype(np.int64).reshape(len(labels), len(labels))
    texts = int(table.sum())
    if texts == 0:
        return {"texts": 0}
    right = int(np.trace(table))
    drawn = _drawn_f1(table)
    scores = f1(table)
    return {
        "texts": texts,
        "accuracy": right / texts,
        "accuracy_interval": list(wilson(right, texts)),
        "macro_f1": float(scores.mean()),
        "macro_f1_interval": [float(value) for value in np.quantile(drawn, (0.025, 0.975))],
        "commonest": float(table.sum(axis=1).max() / texts),
        "f1_by_label": dict(zip(labels, scores.tolist(), strict=True)),
    }


def f1(tables: np.ndarray) -> np.ndarray:
    """F1 of each label [..., N] from tables [..., N, N]; 0 for a label that no text and no answer has."""
    right = np.diagonal(tables, axis1=-2, axis2=-1)
    both = tables.sum(axis=-1) + tables.sum(axis=-2)
    return 2 * right / np.maximum(both, 1)


def wilson(right: int, texts: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, given `right` of `texts`."""
    share, spread = right / texts, _Z**2 / texts
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / texts + spread / (4 * texts))
    return max(0.0, middle - half), min(1.0, middle + half)


def _drawn_f1(table: np.ndarray) -> np.ndarray:
    """Macro F1 of bootstrap samples. A text only adds 1 to its cell of the table, so counts of cells are drawn."""
    random, texts = np.random.default_rng(0), int(table.sum())
    chances = table.flatten() / texts
    found = []
    for _ in range(_DRAWS // _BATCH):
        drawn = random.multinomial(texts, chances, size=_BATCH)
        found.append(f1(drawn.reshape(_BATCH, *table.shape)).mean(axis=-1))
    return np.concatenate(found)
