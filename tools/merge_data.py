#!/usr/bin/env python3
"""Concatenate indexed corpora of the same tokenizer into a new one."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.data.corpus_check import write_checksums
from megalite.data.indexed import IndexedCorpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError
from megalite.inputs import reading
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.program import run_program


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    args = parser.parse_args(argv)
    with reading(args.input[0], DataError):
        first = IndexedCorpus(args.input[0])
    with IndexedWriter(args.output, first.dtype) as writer:
        for prefix in args.input:
            with reading(prefix, DataError):
                writer.add_corpus(prefix)
    write_checksums(args.output)
    print(f"{args.output}: {IndexedCorpus(args.output).num_documents} documents")
    return 0


if __name__ == "__main__":
    run_program(main)
