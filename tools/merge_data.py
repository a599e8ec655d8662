#!/usr/bin/env python3
"""Concatenate indexed corpora of the same tokenizer into a new one, with their marks and labels."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.data.indexed import IndexedCorpus
from megalite.data.merging import merge
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.run_program import run_program


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    args = parser.parse_args(argv)
    merge(args.input, args.output)
    print(f"{args.output}: {IndexedCorpus(args.output).num_documents} documents")
    return 0


if __name__ == "__main__":
    run_program(main)
