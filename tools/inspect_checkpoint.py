#!/usr/bin/env python3
"""Show and check the contents of a checkpoint; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.commands.inspect_checkpoint import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
