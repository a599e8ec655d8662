#!/usr/bin/env python3
"""Make a sentiment data set of sentences rated by people, from the source package of vaderSentiment (MIT).

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 && tar xzf vaderSentiment-3.3.2.tar.gz
    python tools/collect_sentiment.py --source vaderSentiment-3.3.2 --output data/sentiment

Writes FOLDER/train.jsonl and FOLDER/valid.jsonl, lines of text and label: "negative" for a mean rating below 0,
"positive" above it. The sentences are from film and product reviews, editorials and tweets. One in ten texts is for
validation, with all its sentences. Prints the accuracy of the package's own lexicon on the validation sentences.
"""

import html
import importlib.util
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.data.collected import write_collected
from megalite.errors import DataError
from megalite.inputs import reading
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.run_program import run_program
from megalite.training.classification import figures

LABELS = ["negative", "positive"]
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
EVERY = 10  # one in this many texts is for validation


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source", required=True, metavar="FOLDER", help="the unpacked source package"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    source, folder = Path(args.source), Path(args.output)
    with reading(source / ARCHIVE, DataError):
        parts = _sentences(source / ARCHIVE)
    for name, lines in parts.items():
        rows = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
        write_collected(folder / f"{name}.jsonl", rows)
        counts = Counter(line["label"] for line in lines)
        print(f"{folder}/{name}.jsonl: {len(rows)} sentences, {dict(counts)}")
    print(json.dumps({"lexicon": _verdict(source, parts["valid"])}))
    return 0


def _sentences(archive: Path) -> dict[str, list[dict[str, str]]]:
    """The lines of each part, film reviews first."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "valid": []}
    with tarfile.open(archive) as held:
        for name in FILES:
            file = held.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert file is not None
            for line in io.TextIOWrapper(file, encoding="utf-8"):
                number, rating, text = line.rstrip("\r\n").split("\t")
                if float(rating) == 0:
                    continue
                # "12_3" is the third sentence of text 12.
                part = "valid" if int(number.partition("_")[0]) % EVERY == 0 else "train"
                label = LABELS[float(rating) > 0]
                parts[part].append({"text": html.unescape(text), "label": label, "from": name})
    return parts


def _verdict(source: Path, lines: list[dict[str, str]]) -> dict[str, Any]:
    """Figures of the lexicon with its rules: the sign of its `compound`. If that is 0, it gives no answer, which counts
    as "positive", the commoner label."""
    path = source / "vaderSentiment/vaderSentiment.py"
    spec = importlib.util.spec_from_file_location("vaderSentiment", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    counts, silent = [0.0] * 4, 0
    for line in lines:
        compound = analyzer.polarity_scores(line["text"])["compound"]
        silent += compound == 0
        counts[2 * LABELS.index(line["label"]) + (compound >= 0)] += 1
    return figures(counts, LABELS) | {"says_nothing": silent / len(lines)}


if __name__ == "__main__":
    run_program(main)
