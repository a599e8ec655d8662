#!/usr/bin/env python3
"""Show on your own config that layouts train the same: see --help. Exit 0: they agree; 1: one differs; 2: a mistake."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.prove.verify import main
from megalite.ranks.program import run_program

if __name__ == "__main__":
    run_program(main)
