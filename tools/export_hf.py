#!/usr/bin/env python3
"""Convert a checkpoint to a Hugging Face folder; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.commands.export_hf import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
