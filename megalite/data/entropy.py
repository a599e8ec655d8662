"""How well a corpus can be foretold from counts alone: a yardstick for a loss."""

import numpy as np

from megalite.data.indexed import IndexedCorpus

_BLOCK = 1 << 22  # tokens counted at a time


def unigram_entropy(prefix: str) -> float:
    """Entropy of a corpus's token frequencies, in nats a token: the loss of a model that knows how often each token
    occurs and nothing of its neighbours. Raises DataError for a corpus that cannot be opened."""
    tokens = IndexedCorpus(prefix).tokens
    counts = np.zeros(0, np.int64)
    for start in range(0, len(tokens), _BLOCK):
        part = np.bincount(tokens[start : start + _BLOCK])
        if len(part) > len(counts):
            counts, part = part.astype(np.int64), counts
        counts[: len(part)] += part
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
