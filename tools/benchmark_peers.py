#!/usr/bin/env python3
"""Measure training beside the programs that a user would take instead: see --help and docs/speed.md."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.races.races import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
