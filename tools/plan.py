#!/usr/bin/env python3
"""Find the best layout for a model and a number of ranks, before any rank starts; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.plan.plan_program import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
