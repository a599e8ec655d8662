#!/usr/bin/env python3
"""Tokenize text files into a corpus: PREFIX.bin and PREFIX.idx in Megatron's indexed format; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.commands.preprocess import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main, resumes=True)
