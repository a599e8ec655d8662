#!/usr/bin/env python3
"""Measure a training step on several layouts beside a plain PyTorch loop: see --help."""

import megalite.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.launch import run_program
from megalite.training.benchmark import main

if __name__ == "__main__":
    run_program(main)
