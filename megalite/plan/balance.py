"""How evenly the ranks of the context axis share attention, counted in pairs of query and key.

With only a causal mask the zig-zag cut (parallel/rows.py) is exactly even, with windows nearly so. With packed
documents it depends on their positions, so those of the run's first samples are counted.
"""

from collections.abc import Sequence

import numpy as np

from megalite.config import Config
from megalite.data.loader import TrainData
from megalite.model.spec import TransformerSpec
from megalite.parallel.rows import runs_of

SAMPLES = 64  # at most this many samples are counted


def looked_at(documents: np.ndarray, window: int | None, causal: bool) -> np.ndarray:
    """Number of tokens that each token attends to, int64 [B, S]. documents: the document number of each token [B,
    S]."""
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
    """The pairs of each of `size` ranks of a context axis, as a multiple of an even share."""
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
    """Lines for `--check` and the start of a run about a context axis that gathers keys; empty without one."""
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
    return [_share_line(shares(spec, documents, parallel.context), of)]


def _share_line(by_rank: Sequence[float], of: str) -> str:
    least, most = 100 * min(by_rank), 100 * max(by_rank)
    return f"context: each rank has {least:.1f} to {most:.1f} % of an even share of attention{of}"
