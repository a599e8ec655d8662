"""Concatenates corpora, together with the marks and labels of their tokens: `tools/merge_data.py`."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalite.data.corpus_check import write_checksums
from megalite.data.indexed import (
    IndexedCorpus,
    files_of,
    labels_prefix,
    marks_prefix,
    names_file,
)
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError
from megalite.inputs import read_json_object, reading

KINDS: tuple[Callable[[str], str], ...] = (marks_prefix, labels_prefix)


def merge(inputs: Sequence[str], output: str) -> None:
    """Writes the corpus `output`. Raises DataError if it exists, or if the inputs do not fit together: tokens of
    different types, marks or labels beside only some of them, or different names of labels."""
    kinds = [kind for kind in KINDS if _is_beside_all(kind, inputs)]
    names = _names(inputs) if labels_prefix in kinds else None
    # The tokens are last: a corpus that exists has its marks and labels.
    parts = [([kind(prefix) for prefix in inputs], kind(output)) for kind in kinds]
    parts.append(([*inputs], output))
    with contextlib.ExitStack() as writers:
        # An ExitStack exits in reverse order.
        for sources, target in reversed(parts):
            with reading(sources[0], DataError):
                first = IndexedCorpus(sources[0])
            writer = writers.enter_context(IndexedWriter(target, first.dtype))
            for prefix in sources:
                with reading(prefix, DataError):
                    writer.add_corpus(prefix)
        if names is not None:
            _copy(names, names_file(output))
    for _, target in parts:
        write_checksums(target)


def _is_beside_all(kind: Callable[[str], str], inputs: Sequence[str]) -> bool:
    """Whether every input has a corpus of that kind beside it. Raises DataError if only some have."""
    having = [prefix for prefix in inputs if files_of(kind(prefix))[0].exists()]
    if having and len(having) < len(inputs):
        without = next(prefix for prefix in inputs if prefix not in having)
        index = files_of(kind(without))[0]
        raise DataError(f"{index}: missing: all inputs must have one, as {having[0]} has")
    return bool(having)


def _names(inputs: Sequence[str]) -> Path:
    """The file with the names of the labels. Raises DataError if the inputs differ in them."""
    first, *others = [(names_file(prefix), _classes(prefix)) for prefix in inputs]
    for path, classes in others:
        if classes != first[1]:
            raise DataError(f"{path}: classes: {classes}: must be {first[1]}, as in {first[0]}")
    return first[0]


def _classes(prefix: str) -> Any:
    return read_json_object(names_file(prefix), DataError).get("classes")


def _copy(source: Path, target: Path) -> None:
    partial = Path(f"{target}.partial")
    partial.write_bytes(source.read_bytes())
    os.replace(partial, target)
