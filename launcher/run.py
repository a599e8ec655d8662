"""Starts one of its neighbours with `deepspeed`, and sees to its end; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.ranks.launch import run_program
from megalite.supervisor.restarts import main

if __name__ == "__main__":
    run_program(main, resumes=True)
