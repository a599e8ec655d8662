"""Trains a model on the ranks that `deepspeed` (or torchrun, or srun) starts; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.ranks.run_program import run_program
from megalite.training.pretraining import main

if __name__ == "__main__":
    run_program(main, resumes=True)
