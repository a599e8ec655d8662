"""Splits a share of a corpus's tokens off for validation, whether it has many small documents or a single book.

Whole documents are taken in a fixed pseudo-random order, as long as they fit. If much is still missing then, it is cut
off the end of the longest remaining document, such as the last pages of a book. No token is in both parts. The parts
keep the order of the documents.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalite.data.corpus_check import write_checksums
from megalite.data.indexed import IndexedCorpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError

_MISSING = 0.2  # share of the wanted tokens: if fewer are missing, no document is cut
_SEED = 0


class CorpusSplit(NamedTuple):
    """valid: numbers of the documents that go to validation as a whole; cut: the document whose last `tokens` tokens
    also go there (0: none)."""

    valid: frozenset[int]
    cut: int
    tokens: int


def choose(lengths: np.ndarray, wanted: int) -> CorpusSplit:
    """Chooses documents with about `wanted` tokens together. lengths: of all documents, in tokens."""
    taken: set[int] = set()
    missing = wanted
    for number in np.random.default_rng(_SEED).permutation(len(lengths)).tolist():
        if 0 < lengths[number] <= missing:
            taken.add(number)
            missing -= int(lengths[number])
    left = [0 if number in taken else int(length) for number, length in enumerate(lengths)]
    longest = int(np.argmax(left)) if left else 0
    # The last remaining document must not go to validation as a whole.
    is_cut = missing > _MISSING * wanted and left[longest] > missing
    return CorpusSplit(frozenset(taken), longest, missing if is_cut else 0)


def split_corpus(source: str | Path, train: str | Path, valid: str | Path, wanted: int) -> None:
    """Writes the corpora `train` and `valid` from `source`, with about `wanted` tokens in `valid`. Raises DataError if
    one of them would be empty or already exists."""
    corpus = IndexedCorpus(source)
    lengths = corpus.document_lengths(0, corpus.num_documents)
    cut = choose(lengths, wanted)
    if wanted < 1 or not (cut.valid or cut.tokens) or len(cut.valid) == len(lengths):
        raise DataError(
            f"{source}: {corpus.num_tokens} tokens in {len(lengths)} documents: too few to split off {wanted} tokens "
            "for validation"
        )
    with (
        IndexedWriter(train, corpus.dtype) as training,
        IndexedWriter(valid, corpus.dtype) as validation,
    ):
        for number in range(len(lengths)):
            tokens = corpus.document(number)
            if number in cut.valid:
                validation.add_document(tokens)
                continue
            kept = len(tokens) - (cut.tokens if number == cut.cut else 0)
            training.add_document(tokens[:kept])
            if kept < len(tokens):
                validation.add_document(tokens[kept:])
    write_checksums(train)
    write_checksums(valid)
