#!/usr/bin/env python3
"""Show on your own config that layouts train the same: see --help. Exit 0: they agree; 1: one differs; 2: a mistake."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.prove.verify import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
