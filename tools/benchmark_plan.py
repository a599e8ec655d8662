#!/usr/bin/env python3
"""Measure layouts of a small model and compare with the planner's predictions: see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.prove.ranking import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
