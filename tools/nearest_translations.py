#!/usr/bin/env python3
"""Baselines for translation: chrF and BLEU of copying each source, and of the translation of the most similar source in
the training pairs.

    python tools/nearest_translations.py --train data/catalogues/train.jsonl --test data/catalogues/valid.jsonl

Similarity is the cosine of character trigram counts, weighted by inverse document frequency. Prints a JSON line with
`copy` and `nearest`.
"""

import megalite.ranks.startup  # noqa: F401  (first: see there)

# isort: split
import json
from collections import Counter, defaultdict

import numpy as np

from megalite.inference.translations import read_pairs, scores
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.run_program import run_program


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, metavar="FILE", help="lines of source, target")
    parser.add_argument("--test", required=True, metavar="FILE", help="lines of source, target")
    args = parser.parse_args(argv)
    train, test = read_pairs(args.train), read_pairs(args.test)
    index = Nearest([source for source, _ in train])
    targets = [target for _, target in test]
    found = {
        "copy": scores([source for source, _ in test], targets),
        "nearest": scores([train[index.find(source)][1] for source, _ in test], targets),
    }
    print(json.dumps(found))
    return 0


class Nearest:
    """Finds the most similar text by trigrams."""

    def __init__(self, texts: list[str]) -> None:
        places: dict[str, list[int]] = defaultdict(list)
        counts: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(texts):
            for trigram, count in trigrams(text).items():
                places[trigram].append(number)
                counts[trigram].append(count)
        self.rarity = {trigram: np.log(len(texts) / len(held)) for trigram, held in places.items()}
        self.places = {trigram: np.array(held) for trigram, held in places.items()}
        self.weights = {
            trigram: np.array(held) * self.rarity[trigram] for trigram, held in counts.items()
        }
        squares = np.zeros(len(texts))
        for trigram, held in self.places.items():
            squares[held] += self.weights[trigram] ** 2
        self.lengths = np.sqrt(np.maximum(squares, 1e-12))

    def find(self, text: str) -> int:
        """Number of the most similar text; the first of ties."""
        products = np.zeros(len(self.lengths))
        for trigram, count in trigrams(text).items():
            if trigram in self.places:
                weight = count * self.rarity[trigram]
                products[self.places[trigram]] += weight * self.weights[trigram]
        return int(np.argmax(products / self.lengths))


def trigrams(text: str) -> Counter[str]:
    """Character trigrams with counts, including the text's beginning and end."""
    framed = f"\x02{text.lower()}\x03"
    return Counter(framed[place : place + 3] for place in range(max(1, len(framed) - 2)))


if __name__ == "__main__":
    run_program(main)
