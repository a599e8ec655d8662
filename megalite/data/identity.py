"""The identity of a corpus, independent of its path: sizes, and hashes of the index and of samples of the tokens.

It does not detect damage (corpus_check.py does): a run computes it at each start, so only some tokens are read.
"""

import functools
import hashlib
from typing import Any

from megalite.data.indexed import IndexedCorpus, files_of

# Spread evenly over the tokens, so that corpora whose documents have equal lengths are still told apart by their text.
PARTS = 64
PART_TOKENS = 1024


def identity(prefix: str) -> dict[str, Any]:
    """The identity of a corpus, as a JSON object."""
    stats = [path.stat() for path in files_of(prefix)]
    return _identity(prefix, tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))


@functools.lru_cache(maxsize=4096)  # called before and during a run
def _identity(prefix: str, files: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    corpus = IndexedCorpus(prefix)
    tokens = hashlib.sha256()
    for part in range(PARTS):
        start = part * max(0, corpus.num_tokens - PART_TOKENS) // (PARTS - 1)
        tokens.update(corpus.read(start, min(start + PART_TOKENS, corpus.num_tokens)).data)
    return {
        "tokens": corpus.num_tokens,
        "sequences": corpus.num_sequences,
        "documents": corpus.num_documents,
        "index_sha256": corpus.index_sha256(),
        "tokens_sha256": tokens.hexdigest(),
    }
