#!/usr/bin/env python3
"""Show what a checkpoint holds, and check it; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.commands.inspect_checkpoint import main
from megalite.ranks.program import run_program

if __name__ == "__main__":
    run_program(main)
