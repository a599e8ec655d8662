"""Translations of a file's sources, compared with its targets by chrF and BLEU."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.data.documents import Bad
from megalite.data.pairs import pair_of
from megalite.errors import DataError
from megalite.inputs import lines_of, parse_json

Pair = tuple[str, str]


def read_pairs(path: str | Path) -> list[Pair]:
    """Source and target of each line. Raises DataError, which names the file and the line."""
    found = []
    for number, line in lines_of(path, DataError):
        value = parse_json(line, f"{path}:{number}", DataError)
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: must hold an object with source and target")
        pair = pair_of(value, number)
        if isinstance(pair, Bad):
            raise DataError(f"{path}:{number}: {pair.reason}")
        found.append(pair)
    if not found:
        raise DataError(f"{path}: must hold one pair per line")
    return found


def scores(translations: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    """chrF (Popović, WMT 2015) and BLEU (Papineni et al., ACL 2002) of a corpus, 0 to 100, as sacrebleu has them (Post,
    WMT 2018), each with its signature. Raises ImportError without sacrebleu."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    result: dict[str, Any] = {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        score = metric.corpus_score(list(translations), [list(targets)])
        result |= {name: score.score, f"{name}_signature": str(metric.get_signature())}
    return result


def check_writable(path: str | Path) -> None:
    """Raises DataError if `write_translations` could not write, or would overwrite a file."""
    path = Path(path)
    if path.exists():
        raise DataError(f"--write: {path}: already exists; choose a new file")
    if not path.parent.is_dir():
        raise DataError(f"--write: {path}: {path.parent} must be an existing folder")


def write_translations(
    path: str | Path, pairs: Sequence[Pair], translations: Sequence[str]
) -> None:
    """Writes one JSON line each: source, target, translation. Raises DataError if the file cannot be written."""
    rows = [
        json.dumps({"source": source, "target": target, "translation": text}, ensure_ascii=False)
        for (source, target), text in zip(pairs, translations, strict=True)
    ]
    try:
        Path(path).write_text("\n".join(rows) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
