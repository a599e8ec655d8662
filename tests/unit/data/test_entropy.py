"""Entropy of a corpus's token frequencies (megalite/data/entropy.py)."""

import math
from pathlib import Path

import numpy as np
import pytest

from megalite.data import entropy
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError


@pytest.mark.parametrize("block", [1, 3, 1 << 22])
def test_entropy_is_that_of_the_shares(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later blocks have higher ids than earlier ones, then lower ones again; some ids never occur."""
    monkeypatch.setattr(entropy, "_BLOCK", block)
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document(np.array([3, 0, 3, 900]))
        writer.add_document(np.array([3, 3, 0, 900]))
    found = entropy.unigram_entropy(str(tmp_path / "corpus"))
    assert found == pytest.approx(1.5 * math.log(2))  # shares 1/2, 1/4 and 1/4


def test_one_token_alone_is_certain(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document(np.array([7] * 10))
    assert entropy.unigram_entropy(str(tmp_path / "corpus")) == 0.0


def test_a_missing_corpus_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        entropy.unigram_entropy(str(tmp_path / "none"))
