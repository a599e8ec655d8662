#!/usr/bin/env python3
"""Make a classification data set of real text: glosses of WordNet's nouns, labelled with their topics.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python tools/collect_glosses.py --wordnet wordnet/usr/share/wordnet --output data/glosses

Writes FOLDER/train.jsonl and FOLDER/valid.jsonl, lines of prompt and completion, or with --labels of text and label;
every tenth gloss is for validation.
"""

import json
from pathlib import Path

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.data.collected import write_collected
from megalite.errors import DataError
from megalite.inputs import reading
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.run_program import run_program

# Numbers of WordNet's lexicographer files (its manual page lexnames(5)).
TOPICS = {4: "act", 5: "animal", 6: "artifact", 10: "communication", 13: "food", 15: "location", 18: "person",
          20: "plant"}  # fmt: skip
MOST = 2500  # glosses per topic


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--wordnet", required=True, metavar="FOLDER", help="folder with data.noun")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--labels", action="store_true", help="write lines of text and label, for a classifier"
    )
    args = parser.parse_args(argv)
    source = Path(args.wordnet) / "data.noun"
    glosses: dict[int, list[str]] = {number: [] for number in TOPICS}
    with reading(source, DataError):
        for line in source.read_text(encoding="utf-8").splitlines():
            # offset, file number, …, | gloss; "example"; the licence on top begins with spaces
            if not line.startswith(" ") and (number := int(line.split()[1])) in TOPICS:
                glosses[number].append(line.partition("| ")[2].partition(";")[0].strip())
    for number, found in glosses.items():
        # Evenly spaced, since WordNet puts similar words together.
        glosses[number] = found[:: max(1, len(found) // MOST)][:MOST]
    folder = Path(args.output)
    for name, wanted in (("train", range(1, 10)), ("valid", range(1))):
        rows = [
            json.dumps(_line(gloss, TOPICS[number], args.labels)) + "\n"
            for number, found in glosses.items()
            for place, gloss in enumerate(found)
            if place % 10 in wanted
        ]
        write_collected(folder / f"{name}.jsonl", rows)
        print(f"{folder}/{name}.jsonl: {len(rows)} glosses of {len(TOPICS)} topics")
    return 0


def _line(gloss: str, topic: str, labels: bool) -> dict[str, str]:
    if labels:
        return {"text": gloss, "label": topic}
    return {"prompt": f"{gloss}\nTopic:", "completion": f" {topic}"}


if __name__ == "__main__":
    run_program(main)
