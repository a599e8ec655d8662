#!/usr/bin/env python3
"""Look at the hosts of a run before it starts; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.doctor.examine import main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(main)
