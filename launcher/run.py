"""Starts one of the programs beside it with `deepspeed`, and supervises it; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.ranks.run_program import run_program
from megalite.supervisor.restarts import main

if __name__ == "__main__":
    run_program(main, resumes=True)
