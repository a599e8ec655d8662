"""Tokens split off for validation: whole documents if they fit, else the end of the longest one."""

from pathlib import Path

import numpy as np
import pytest

from megalite.data.corpus_check import check_corpus
from megalite.data.indexed import IndexedCorpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.split_corpus import choose, split_corpus
from megalite.errors import DataError


def write(folder: Path, lengths: list[int]) -> list[list[int]]:
    """Writes documents whose tokens all differ."""
    starts = np.cumsum([0, *lengths])
    documents = [list(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    with IndexedWriter(folder / "whole", np.int32) as writer:
        for document in documents:
            writer.add_document(document)
    return documents


def parts(folder: Path, wanted: int) -> tuple[IndexedCorpus, IndexedCorpus]:
    split_corpus(folder / "whole", folder / "train", folder / "valid", wanted)
    for name in ("train", "valid"):
        check_corpus(str(folder / name), 10**6)
    return IndexedCorpus(folder / "train"), IndexedCorpus(folder / "valid")


def test_a_single_document_loses_its_end(tmp_path: Path) -> None:
    write(tmp_path, [1000])
    train, valid = parts(tmp_path, 50)
    assert train.tokens.tolist() == list(range(950))
    assert valid.tokens.tolist() == list(range(950, 1000))
    assert train.num_documents == valid.num_documents == 1


def test_small_documents_stay_whole(tmp_path: Path) -> None:
    documents = write(tmp_path, [7 + i % 5 for i in range(300)])
    train, valid = parts(tmp_path, 150)
    assert 120 <= valid.num_tokens <= 150
    held = [valid.document(i).tolist() for i in range(valid.num_documents)]
    assert all(document in documents for document in held)
    assert sorted([*train.tokens.tolist(), *valid.tokens.tolist()]) == list(
        range(sum(map(len, documents)))
    )
    assert held == sorted(held)  # the order of the documents
    numbers = [document[0] for document in held]
    assert max(numbers) - min(numbers) > 1000  # from all over the corpus


def test_the_rest_is_cut_off_the_longest_document(tmp_path: Path) -> None:
    write(tmp_path, [400, 5, 900, 300])
    train, valid = parts(tmp_path, 80)
    assert valid.num_tokens == 80 and train.num_tokens == 1525
    assert valid.tokens.tolist() == [400, 401, 402, 403, 404, *range(1230, 1305)]


def test_the_choice_is_the_same_each_time_and_ignores_empty_documents() -> None:
    lengths = np.array([0, 3, 0, 4, 50, 0])
    assert choose(lengths, 7) == choose(lengths, 7)
    assert choose(lengths, 7).valid == {1, 3}


@pytest.mark.parametrize(("lengths", "wanted"), [([40], 0), ([40], 40), ([10, 10], 20)])
def test_neither_part_may_be_empty(tmp_path: Path, lengths: list[int], wanted: int) -> None:
    write(tmp_path, lengths)
    with pytest.raises(DataError, match="too few to split"):
        split_corpus(tmp_path / "whole", tmp_path / "train", tmp_path / "valid", wanted)
    assert not list(tmp_path.glob("train*")) and not list(tmp_path.glob("valid*"))
