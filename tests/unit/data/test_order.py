"""Orders of samples: the computed permutation, windows and blends, compared with plain implementations."""

import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.blend import Blend
from megalite.data.indexed import IndexedCorpus
from megalite.data.permutation import mixed, permuted
from megalite.data.samples import Samples, Shuffled, Windows, read_documents, read_tokens
from tests.unit.data.corpora import write_corpus


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_a_permutation_takes_each_element_once(size: int, key: int) -> None:
    whole = permuted(np.arange(size), size, key)
    assert sorted(whole.tolist()) == list(range(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert (permuted(some, size, key) == whole[some]).all()


def test_permutations_are_even_and_differ_by_key() -> None:
    size, keys = 7, 1500
    seen = np.stack([permuted(np.arange(size), size, mixed(1, key)) for key in range(keys)])
    for place in range(size):
        counts = np.bincount(seen[:, place], minlength=size)
        chi_square = float(((counts - keys / size) ** 2 / (keys / size)).sum())
        assert chi_square < 26.1  # 6 degrees of freedom: 1 in 5,000
    large = permuted(np.arange(10**5), 10**5, mixed(3))
    assert abs(np.corrcoef(large, np.arange(10**5))[0, 1]) < 0.015
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.015
    assert int((large == permuted(np.arange(10**5), 10**5, mixed(4))).sum()) < 10


def test_the_order_is_the_same_everywhere() -> None:
    """A run resumed under another release must get the same samples: these values are part of the format."""
    assert permuted(np.arange(10), 10, mixed(1234, 0, 0)).tolist() == [3, 4, 9, 7, 2, 1, 0, 5, 8, 6]
    far = permuted(np.array([0, 1, 10**12 - 1]), 10**12, mixed(1234, 0, 0)).tolist()
    assert far == [649054379120, 317720134609, 350131711303]


def read(samples: Samples, positions: np.ndarray, length: int) -> np.ndarray:
    out = np.empty((len(positions), length + 1), np.int64)
    for row, pieces in zip(out, samples.pieces(positions), strict=True):
        read_tokens(samples.corpus, pieces, row)
    return out


def test_each_epoch_takes_every_window_once(tmp_path: Path) -> None:
    made = write_corpus(tmp_path / "a", 50)
    flat, length = np.concatenate(made), 16
    corpus = IndexedCorpus(tmp_path / "a")
    windows = Windows(corpus, length)
    assert windows.num_samples == (len(flat) - 1) // length
    order = Shuffled(windows, 5, 0)
    size = windows.num_samples
    out = read(order, np.arange(2 * size), length)
    expected = sorted(flat[i * length : i * length + length + 1].tolist() for i in range(size))
    assert sorted(out[:size].tolist()) == sorted(out[size:].tolist()) == expected
    assert not (out[:size] == out[size:]).all()
    other = read(Shuffled(windows, 5, 1), np.arange(size), length)
    assert not (other == out[:size]).all()


def test_documents_are_numbered_within_a_sample(tmp_path: Path) -> None:
    made = write_corpus(tmp_path / "a", 80, mean=9)
    corpus, length = IndexedCorpus(tmp_path / "a"), 25
    owner = np.repeat(np.arange(80), [len(document) for document in made])
    windows = Windows(corpus, length)
    for i, pieces in enumerate(windows.pieces(np.arange(windows.num_samples))):
        row = np.empty(length + 1, np.int32)
        read_documents(corpus, pieces, row)
        part = owner[i * length : i * length + length + 1]
        assert row.tolist() == (part - part[0]).tolist()


def test_a_split_is_a_part_by_sequences(tmp_path: Path) -> None:
    made = write_corpus(tmp_path / "a", 50)
    corpus = IndexedCorpus(tmp_path / "a")
    flat = np.concatenate(made[30:45])
    windows = Windows(corpus, 16, [0.6, 0.9])
    out = read(windows, np.arange(windows.num_samples), 16)
    assert windows.num_samples == (len(flat) - 1) // 16
    assert out[:, :-1].ravel().tolist() == flat[: windows.num_samples * 16].tolist()


def deviations(blend: Blend, start: int, count: int) -> float:
    """The largest deviation of a corpus from its share, after each of `count` positions from `start` on."""
    corpora, places = blend.locate(np.arange(start, start + count))
    given = blend.counts(start)
    worst = Fraction(0)
    for position, (corpus, place) in enumerate(
        zip(corpora.tolist(), places.tolist(), strict=True), start + 1
    ):
        assert place == given[corpus]
        given[corpus] += 1
        for part, number in zip(blend._parts, given, strict=True):
            worst = max(worst, abs(number - Fraction(position * part, blend._total)))
    assert given == blend.counts(start + count)
    return float(worst)


@pytest.mark.parametrize("seed", range(12))
def test_shares_hold_at_every_prefix(seed: int) -> None:
    """In exact arithmetic, across the boundary of two blocks, at the start of a run and far into it."""
    chance = random.Random(seed)
    weights = [
        chance.choice([chance.random(), chance.randint(1, 9), 10 ** chance.uniform(-2, 1)])
        for _ in range(chance.randint(2, 9))
    ]
    blend = Blend(weights)
    assert deviations(blend, 0, 1500) < 1
    assert deviations(blend, blend._block - 700, 1400) < 1
    assert deviations(blend, blend._block * chance.randrange(10**6) - 700, 1400) < 1
    shares = [float(Fraction(repr(float(weight)))) / sum(weights) for weight in weights]
    assert blend.shares == pytest.approx(shares, rel=1e-9)


def test_many_corpora_and_small_shares(tmp_path: Path) -> None:
    assert deviations(Blend([1] * 40 + [0.01]), 0, 1200) < 1
    assert deviations(Blend([0.5] + [0.5 / 30] * 30), 10**9, 1200) < 1
    tiny = Blend([1e-5, 1.0])
    assert tiny.counts(10**8) == [pytest.approx(1000, abs=1), pytest.approx(10**8 - 1000, abs=1)]


def test_one_corpus_takes_every_position() -> None:
    corpora, places = Blend([0.3]).locate(np.array([0, 5, 10**11]))
    assert corpora.tolist() == [0, 0, 0] and places.tolist() == [0, 5, 10**11]
    assert Blend([0.3]).counts(7) == [7]
