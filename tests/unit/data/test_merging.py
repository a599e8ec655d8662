"""Merged corpora keep their marks and labels (megalite/data/merging.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from megalite.data.corpus_check import check_corpus
from megalite.data.indexed import (
    IndexedCorpus,
    labels_prefix,
    marks_prefix,
    names_file,
)
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.merging import merge
from megalite.errors import DataError


def corpus(prefix: Path, first: int, *beside: str, classes: tuple[str, ...] = ("a", "b")) -> str:
    """Writes two documents of tokens from `first` on, with corpora of bytes beside them."""
    for target, dtype in ((str(prefix), np.uint16), *((name, np.uint8) for name in beside)):
        with IndexedWriter(target, dtype) as writer:
            for start, stop in ((0, 3), (3, 7)):
                tokens = np.arange(first + start, first + stop)
                writer.add_document(tokens if dtype is np.uint16 else tokens % 2)
    if labels_prefix(prefix) in beside:
        names_file(prefix).write_text(json.dumps({"classes": list(classes)}))
    return str(prefix)


@pytest.mark.parametrize("kind", [marks_prefix, labels_prefix])
def test_marks_and_labels_are_merged_with_the_tokens(tmp_path: Path, kind: type) -> None:
    inputs = [
        corpus(tmp_path / name, 10 * n, kind(tmp_path / name)) for n, name in ((1, "x"), (2, "y"))
    ]
    output = str(tmp_path / "z")
    merge(inputs, output)
    tokens = [*range(10, 17), *range(20, 27)]
    assert IndexedCorpus(output).tokens.tolist() == tokens
    beside = IndexedCorpus(kind(output))
    assert beside.tokens.tolist() == [token % 2 for token in tokens] and beside.num_documents == 4
    assert names_file(output).exists() == (kind is labels_prefix)
    check_corpus(output, 100)
    check_corpus(kind(output), 2)


def test_without_marks_or_labels_none_are_written(tmp_path: Path) -> None:
    merge([corpus(tmp_path / "x", 10), corpus(tmp_path / "y", 20)], str(tmp_path / "z"))
    assert sorted(path.name for path in tmp_path.glob("z*")) == ["z.bin", "z.idx", "z.sha256"]


def test_inputs_that_do_not_fit_together_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    marked = corpus(tmp_path / "x", 10, marks_prefix(tmp_path / "x"))
    labelled = corpus(tmp_path / "l", 10, labels_prefix(tmp_path / "l"))
    other = corpus(tmp_path / "o", 10, labels_prefix(tmp_path / "o"), classes=("b", "a"))
    plain = corpus(tmp_path / "y", 20)
    for inputs, line in (
        ([marked, plain], "y.mask.idx: missing: all inputs must have one, as .*x has"),
        ([plain, labelled], "y.label.idx: missing"),
        ([labelled, other], "o.label.json: classes: .*: must be .'a', 'b'., as in .*l.label.json"),
        ([marked, marked[:-1]], "missing"),
    ):
        with pytest.raises(DataError, match=line):
            merge(inputs, str(tmp_path / "z"))
    assert list(tmp_path.glob("z*")) == []


@pytest.mark.parametrize("output", ["", "FOLDER/", "FOLDER/."])
def test_a_prefix_has_a_name(tmp_path: Path, output: str) -> None:
    plain = corpus(tmp_path / "y", 20)
    with pytest.raises(DataError, match="is a folder: must be a prefix, such as"):
        merge([plain], output.replace("FOLDER", str(tmp_path)))
