"""The unigram entropy of a corpus: the loss of a model that knows only token frequencies, as a baseline."""

import numpy as np

from megalite.data.indexed import IndexedCorpus

_BLOCK = 1 << 22  # tokens counted at a time


def unigram_entropy(prefix: str) -> float:
    """Entropy of a corpus's token frequencies, in nats per token: the loss of a model that predicts each token by its
    frequency alone. Raises DataError for a corpus that cannot be opened."""
    tokens = IndexedCorpus(prefix).tokens
    counts = np.zeros(0, np.int64)
    for start in range(0, len(tokens), _BLOCK):
        part = np.bincount(tokens[start : start + _BLOCK])
        if len(part) > len(counts):
            counts, part = part.astype(np.int64), counts
        counts[: len(part)] += part
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
