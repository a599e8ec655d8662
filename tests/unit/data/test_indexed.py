"""The indexed format: bytes, views, merging, and a comparison with megatron-core's files."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import DTYPES, IndexedCorpus, files_of, token_dtype
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError
from tests.unit.data.corpora import write_corpus


def bytes_of(prefix: Path) -> list[bytes]:
    return [path.read_bytes() for path in files_of(prefix)]


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([4, 5, 6, 7], sizes=[1, 3])
    index, tokens = bytes_of(tmp_path / "a")
    assert index[:34] == b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 3)
    assert index[34:] == struct.pack("<3i3q3q", 3, 1, 3, 0, 6, 8, 0, 1, 3)
    assert tokens == struct.pack("<7H", 1, 2, 3, 4, 5, 6, 7)
    corpus = IndexedCorpus(tmp_path / "a")
    corpus.check_index()
    assert corpus.document(1).tolist() == [4, 5, 6, 7] and corpus.sequence(2).tolist() == [5, 6, 7]
    assert [corpus.document_at(token) for token in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert corpus.document_starts(0, 7) == [3] and corpus.document_starts(3, 7) == []


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_every_type_comes_back(tmp_path: Path, dtype: type) -> None:
    made = write_corpus(tmp_path / "a", 20, vocabulary=100, dtype=dtype)
    corpus = IndexedCorpus(tmp_path / "a")
    assert corpus.tokens.dtype == dtype and corpus.num_documents == 20
    assert all((corpus.document(i) == document).all() for i, document in enumerate(made))


def test_a_merge_is_what_one_writer_makes(tmp_path: Path) -> None:
    made = write_corpus(tmp_path / "a", 30, seed=1) + write_corpus(tmp_path / "b", 20, seed=2)
    with (
        IndexedWriter(tmp_path / "merged", np.uint16) as merged,
        IndexedWriter(tmp_path / "one", np.uint16) as one,
    ):
        merged.add_corpus(tmp_path / "a")
        merged.add_corpus(tmp_path / "b")
        for document in made:
            one.add_document(document)
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "one")
    write_corpus(tmp_path / "wide", 3, dtype=np.int32)
    with (
        pytest.raises(DataError, match="must be uint16, as in the output"),
        IndexedWriter(tmp_path / "c", "u2") as writer,
    ):
        writer.add_corpus(tmp_path / "wide")
    assert not list(tmp_path.glob("c.*"))


def test_a_writer_keeps_existing_files_and_leaves_no_partial_ones(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 3)
    before = bytes_of(tmp_path / "a")
    with pytest.raises(DataError, match="already exists"):
        IndexedWriter(tmp_path / "a", np.uint16)
    with (
        pytest.raises(DataError, match="token id 65536: does not fit"),
        IndexedWriter(tmp_path / "b", "u2") as writer,
    ):
        writer.add_document([1, 65536])
    assert bytes_of(tmp_path / "a") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_the_type_follows_the_vocabulary() -> None:
    assert token_dtype(65_499) == np.uint16 and token_dtype(65_500) == np.int32


def test_megatron_core_writes_and_reads_the_same_files(tmp_path: Path) -> None:
    theirs = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed"
    )
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(3)
    for dtype in (np.uint16, np.int32):
        ours, builder = tmp_path / f"ours_{dtype.__name__}", tmp_path / f"theirs_{dtype.__name__}"
        written = theirs.IndexedDatasetBuilder(f"{builder}.bin", dtype=dtype)
        with IndexedWriter(ours, dtype) as writer:
            for _ in range(50):
                sizes = random.integers(0, 30, random.integers(0, 4)).tolist()
                tokens = random.integers(0, 60_000, sum(sizes))
                writer.add_document(tokens, sizes)
                written.add_document(torch.tensor(tokens), sizes)
        written.finalize(f"{builder}.idx")
        assert bytes_of(ours) == bytes_of(builder)
        corpus, dataset = IndexedCorpus(builder), theirs.IndexedDataset(str(ours))
        corpus.check_index()
        assert len(dataset) == corpus.num_sequences
        assert all((dataset[i] == corpus.sequence(i)).all() for i in range(len(dataset)))
    merged = theirs.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    merged.add_index(str(tmp_path / "ours_int32"))
    merged.add_index(str(tmp_path / "ours_int32"))
    merged.finalize(str(tmp_path / "m.idx"))
    with IndexedWriter(tmp_path / "n", np.int32) as writer:
        writer.add_corpus(tmp_path / "ours_int32")
        writer.add_corpus(tmp_path / "ours_int32")
    assert bytes_of(tmp_path / "n") == bytes_of(tmp_path / "m")
