"""Trains a model on the ranks that `deepspeed` (or torchrun, or srun) starts; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.ranks.launch import run_program
from megalite.training.pretrain import main

if __name__ == "__main__":
    run_program(main, resumes=True)
