#!/usr/bin/env python3
"""Tokenize text files into a corpus: PREFIX.bin and PREFIX.idx in Megatron's indexed format; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.commands.preprocess import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main, resumes=True)
