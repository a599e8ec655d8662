#!/usr/bin/env python3
"""Convert a Hugging Face folder to a checkpoint that any layout loads; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.commands.import_hf import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
