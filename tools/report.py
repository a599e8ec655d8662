#!/usr/bin/env python3
"""Show run folders as one page, with curves, samples, memory and the pipeline: see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.ranks.run_program import run_program
from megalite.report.report_program import main

if __name__ == "__main__":
    run_program(main)
