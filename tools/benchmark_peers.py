#!/usr/bin/env python3
"""Measure training beside the programs that a user would take instead: see --help and docs/speed.md."""

import megalite.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.launch import run_program
from megalite.prove.races import main

if __name__ == "__main__":
    run_program(main)
