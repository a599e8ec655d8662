#!/usr/bin/env python3
"""Convert a checkpoint to a Hugging Face folder; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.commands.export_hf import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
