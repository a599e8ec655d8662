#!/usr/bin/env python3
"""Check the hosts of a run before it starts; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.doctor.examine import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
