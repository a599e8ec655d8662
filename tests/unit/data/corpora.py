"""Small corpora for the data tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config import Data
from megalite.config.section import parse
from megalite.data.indexed_writer import IndexedWriter


def write_corpus(
    prefix: Path,
    documents: int,
    mean: int = 40,
    vocabulary: int = 1000,
    seed: int = 0,
    dtype: Any = np.uint16,
) -> list[np.ndarray]:
    """Writes documents of 1 to 2·mean - 1 random tokens; returns them as arrays."""
    random = np.random.default_rng(seed)
    made = [random.integers(0, vocabulary, random.integers(1, 2 * mean)) for _ in range(documents)]
    with IndexedWriter(prefix, dtype) as writer:
        for document in made:
            writer.add_document(document)
    return made


def data_section(train: Sequence[Any], length: int, **keys: Any) -> Data:
    """The section `megalite.data` of a config."""
    sources = [str(source) if isinstance(source, Path) else source for source in train]
    return parse(Data, {"train": sources, "sequence_length": length, **keys}, "megalite.data")
