#!/usr/bin/env python3
"""Print the unigram entropy of an indexed corpus, in nats per token: a trained model's loss should be far below it."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.data.entropy import unigram_entropy
from megalite.errors import DataError
from megalite.inputs import reading
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.run_program import run_program


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    prefix = parser.parse_args(argv).prefix
    with reading(prefix, DataError):
        entropy = unigram_entropy(prefix)
    print(f"{entropy:.4f}")
    return 0


if __name__ == "__main__":
    run_program(main)
