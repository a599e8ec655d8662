#!/usr/bin/env python3
"""Train a tokenizer on text files; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.commands.train_tokenizer import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
