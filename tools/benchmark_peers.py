#!/usr/bin/env python3
"""Compare the speed of training with the programs that a user would use instead: see --help and docs/speed.md."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.races.races import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
