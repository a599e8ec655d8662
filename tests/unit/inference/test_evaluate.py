"""The loss of a model on samples in one process (megalite/inference/evaluate.py), compared with a plain loop."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalite.data.batch import UNCOUNTED, Batch
from megalite.inference.evaluate import Score, evaluate
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from tests.small_models import MODELS, SEQUENCE, VOCABULARY


class Samples:
    """Random tokens and labels; some of the labels do not count."""

    def __init__(self, count: int, counted: float) -> None:
        random = np.random.default_rng(0)
        self.ids = random.integers(0, VOCABULARY, (count, SEQUENCE + 1))
        self.left_out = random.random((count, SEQUENCE)) >= counted

    def batch(self, positions: Sequence[int]) -> Batch:
        ids, left_out = self.ids[list(positions)], self.left_out[list(positions)]
        labels = np.where(left_out, UNCOUNTED, ids[:, 1:])
        return Batch(ids[:, :-1], labels, None, None)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(read_spec(MODELS["llama"]), Grid()).initialise(3)


@pytest.mark.parametrize("micro", [1, 3, 100])
def test_every_sample_counts_once_by_its_tokens(stage: Stage, micro: int) -> None:
    samples = Samples(7, 0.6)
    found = evaluate(stage, Grid(), samples, 7, SEQUENCE, micro)
    tokens, labels, *_ = samples.batch(range(7))
    with torch.no_grad():
        logits = stage(torch.from_numpy(tokens)).double()
    wanted = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())
    assert found.loss == pytest.approx(wanted.item(), rel=1e-5)
    assert found == Score(found.loss, int((labels != UNCOUNTED).sum()))


def test_only_the_first_samples_count(stage: Stage) -> None:
    samples = Samples(9, 0.9)
    few = evaluate(stage, Grid(), samples, 4, SEQUENCE, 3)
    samples.ids[4:] = 0
    assert evaluate(stage, Grid(), samples, 4, SEQUENCE, 3) == few


def test_samples_without_counted_tokens_have_no_loss(stage: Stage) -> None:
    found = evaluate(stage, Grid(), Samples(2, 0.0), 2, SEQUENCE)
    assert math.isnan(found.loss) and found.tokens == 0
