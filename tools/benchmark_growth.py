#!/usr/bin/env python3
"""Measure the cost of each additional micro-batch, layer and rank: see --help and docs/speed.md."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.races.growth import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
