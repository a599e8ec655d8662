"""`tools/merge_data.py`: corpora one after another in a new one, with what tells of their tokens, marks and labels.

Sequences keep their lengths, so marks and labels stay token by token beside the tokens.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalite.data.corpus_check import write_checksums
from megalite.data.indexed import (
    IndexedCorpus,
    IndexedWriter,
    files_of,
    labels_prefix,
    marks_prefix,
    names_file,
)
from megalite.errors import DataError
from megalite.inputs import read_json_object, reading

KINDS: tuple[Callable[[str], str], ...] = (marks_prefix, labels_prefix)


def merge(inputs: Sequence[str], output: str) -> None:
    """Writes the corpus `output`. Raises DataError where it exists, or where inputs do not fit together: tokens of
    another type, marks or labels beside some of them alone, labels of other names."""
    kinds = [kind for kind in KINDS if _is_beside_all(kind, inputs)]
    names = _names(inputs) if labels_prefix in kinds else None
    # The tokens last: a corpus that is there has what belongs to it.
    parts = [([kind(prefix) for prefix in inputs], kind(output)) for kind in kinds]
    parts.append(([*inputs], output))
    with contextlib.ExitStack() as writers:
        # An ExitStack leaves the last first.
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
    """Whether each input has a corpus of that kind beside it. DataError where some have."""
    having = [prefix for prefix in inputs if files_of(kind(prefix))[0].exists()]
    if having and len(having) < len(inputs):
        without = next(prefix for prefix in inputs if prefix not in having)
        index = files_of(kind(without))[0]
        raise DataError(f"{index}: missing: all inputs must have one, as {having[0]} has")
    return bool(having)


def _names(inputs: Sequence[str]) -> Path:
    """The file with the names of the labels, which all inputs have alike."""
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
