"""Trains a model on the ranks that `deepspeed` (or torchrun, or srun) starts; see --help."""

import megalite.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.launch import run_program
from megalite.training.program import main

if __name__ == "__main__":
    run_program(main, resumes=True)
