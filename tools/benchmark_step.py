#!/usr/bin/env python3
"""Measure a training step on several layouts and compare with a plain PyTorch loop: see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.prove.benchmark import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
