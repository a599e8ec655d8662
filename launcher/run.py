"""Starts one of its neighbours with `deepspeed`, and sees to its end; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.ranks.program import run_program
from megalite.supervisor.restarts import main

if __name__ == "__main__":
    run_program(main, resumes=True)
