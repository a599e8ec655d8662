#!/usr/bin/env python3
"""Find the layout for a model and a number of ranks, before any is asked for: see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.plan.plan_program import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
