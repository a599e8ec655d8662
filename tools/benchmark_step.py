#!/usr/bin/env python3
"""Measure a training step on several layouts beside a plain PyTorch loop: see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.prove.benchmark import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
