#!/usr/bin/env python3
"""Check on your own config that layouts train the same; see --help. Exit code 0: all agree; 1: one differs; 2: a
mistake."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.prove.verify import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
