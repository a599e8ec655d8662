"""How evenly the ranks of the context axis share attention, in pairs of a token and one that it looks at.

With a causal mask alone the zig-zag cut (parallel/rows.py) is exactly even. Windows nearly are. Packed documents depend
on where they are, so those of the first samples of a run are counted.
"""

from collections.abc import Sequence

import numpy as np

from megalite.config import Config
from megalite.data.loader import TrainData
from megalite.model.spec import TransformerSpec
from megalite.parallel.rows import runs_of

SAMPLES = 64  # at most, whose documents are counted


def looked_at(documents: np.ndarray, window: int | None, causal: bool) -> np.ndarray:
    """Tokens that each token looks at, int64 like documents [B, S], which number the documents of each sample."""
    s = documents.shape[1]
    index = np.arange(s)
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    limit = s if window is None else window
    before = np.minimum(index - first + 1, limit)
    if causal:
        return before
    ends = np.roll(begins, -1, axis=1)
    ends[:, -1] = True
    last = np.minimum.accumulate(np.where(ends, index, s)[:, ::-1], axis=1)[:, ::-1]
    return before + np.minimum(last - index, limit - 1)


def shares(spec: TransformerSpec, documents: np.ndarray, size: int) -> list[float]:
    """What each of `size` ranks of a context axis has of all pairs, in units of an even share."""
    pairs = np.zeros(documents.shape[1], np.int64)
    windows = [spec.window(layer) for layer in range(spec.num_layers)]
    for window in dict.fromkeys(windows):
        of_layer = looked_at(documents, window, spec.causal).sum(axis=0)
        pairs += windows.count(window) * of_layer
    by_rank = []
    for rank in range(size):
        own = [int(pairs[run.start : run.stop].sum()) for run in runs_of(len(pairs), size, rank)]
        by_rank.append(sum(own))
    return [size * work / sum(by_rank) for work in by_rank]


def context_lines(config: Config, spec: TransformerSpec) -> list[str]:
    """What `--check` and the start of a run say of a context axis that gathers keys; none where there is none."""
    parallel, data = config.parallel, config.data
    if parallel.context == 1 or parallel.context_attention == "heads":
        return []
    documents, of = np.zeros((1, data.sequence_length), np.int64), ""
    if data.reset_attention:
        count = min(SAMPLES, config.batch_plan.size(0))
        samples = TrainData(data, config.train.seed, spec.vocabulary_size, check=False)
        found = samples.batch(range(count)).documents
        assert found is not None
        documents, of = found, f" in the first {count} samples"
    return [_told(shares(spec, documents, parallel.context), of)]


def _told(by_rank: Sequence[float], of: str) -> str:
    least, most = 100 * min(by_rank), 100 * max(by_rank)
    return f"context: attention of a rank is {least:.1f} to {most:.1f} % of an even share{of}"
