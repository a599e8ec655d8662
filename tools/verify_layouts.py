#!/usr/bin/env python3
"""Show on your own config that layouts train the same: see --help. Exit 0: they agree; 1: one differs; 2: a mistake."""

import megalite.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.launch import run_program
from megalite.training.verify import main

if __name__ == "__main__":
    run_program(main)
