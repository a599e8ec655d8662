#!/usr/bin/env python3
"""Train a tokenizer on text files; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.commands.train_tokenizer import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
