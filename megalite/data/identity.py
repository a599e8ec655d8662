"""What tells a corpus from another, whatever their paths: sizes, and sums of the index and of parts of the tokens.

Not a check of damage (corpus_check.py): a run asks at each start, so the tokens are only looked at in places.
"""

import functools
import hashlib
from typing import Any

from megalite.data.indexed import IndexedCorpus, files_of

# Evenly over the tokens, so that equal lengths of documents do not pass for equal text.
PLACES = 64
PLACE_TOKENS = 1024


def identity(prefix: str) -> dict[str, Any]:
    """Of the corpus of a prefix, as JSON."""
    stats = [path.stat() for path in files_of(prefix)]
    return _identity(prefix, tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))


@functools.lru_cache(maxsize=4096)  # called before a run and in it
def _identity(prefix: str, files: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    corpus = IndexedCorpus(prefix)
    tokens = hashlib.sha256()
    for place in range(PLACES):
        start = place * max(0, corpus.num_tokens - PLACE_TOKENS) // (PLACES - 1)
        tokens.update(corpus.read(start, min(start + PLACE_TOKENS, corpus.num_tokens)).data)
    return {
        "tokens": corpus.num_tokens,
        "sequences": corpus.num_sequences,
        "documents": corpus.num_documents,
        "index_sha256": corpus.index_sha256(),
        "tokens_sha256": tokens.hexdigest(),
    }
