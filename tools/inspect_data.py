#!/usr/bin/env python3
"""Show what is in indexed corpora, and check them; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.commands.inspect_data import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
