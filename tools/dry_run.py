#!/usr/bin/env python3
"""Try a run of many ranks in one process, without a GPU; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.prove.dry_run_program import main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(main)
