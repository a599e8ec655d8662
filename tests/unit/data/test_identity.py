"""Fingerprints that distinguish corpora (megalite/data/identity.py)."""

from pathlib import Path

import numpy as np

from megalite.data.identity import PART_TOKENS, PARTS, identity
from megalite.data.indexed import files_of
from megalite.data.indexed_writer import IndexedWriter


def written(prefix: Path, documents: list[np.ndarray]) -> str:
    for path in files_of(prefix):
        path.unlink(missing_ok=True)
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def test_equal_corpora_are_equal_wherever_they_are(tmp_path: Path) -> None:
    documents = [np.arange(30), np.arange(5)]
    (tmp_path / "b").mkdir()
    one, other = (written(tmp_path / name, documents) for name in ("a", "b/c"))
    assert identity(one) == identity(other)
    assert identity(one)["tokens"] == 35 and identity(one)["documents"] == 2


def test_each_token_of_a_small_corpus_counts_and_so_do_the_cuts(tmp_path: Path) -> None:
    first = identity(written(tmp_path / "a", [np.arange(30), np.arange(5)]))
    for place in (0, 17, 34):
        whole = np.concatenate([np.arange(30), np.arange(5)])
        whole[place] += 1
        found = identity(written(tmp_path / f"changed_{place}", [whole[:30], whole[30:]]))
        assert found["tokens_sha256"] != first["tokens_sha256"]
        assert found | {"tokens_sha256": first["tokens_sha256"]} == first
    moved = identity(written(tmp_path / "moved", [np.arange(29), np.append(29, np.arange(5))]))
    assert moved["index_sha256"] != first["index_sha256"]


def test_a_large_corpus_is_sampled_from_its_first_to_its_last_token(tmp_path: Path) -> None:
    size = 2 * PARTS * PART_TOKENS  # twice the tokens that are read
    tokens = np.zeros(size, np.uint16)
    first = identity(written(tmp_path / "a", [tokens]))
    for place in (0, size - 1):
        changed = tokens.copy()
        changed[place] = 1
        assert identity(written(tmp_path / f"b{place}", [changed])) != first


def test_a_corpus_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    first = identity(written(tmp_path / "a", [np.arange(8)]))
    assert identity(written(tmp_path / "a", [np.arange(8)[::-1]])) != first
