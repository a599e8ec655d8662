"""Trains a model on the ranks that `deepspeed` (or torchrun, or srun) starts; see --help."""

from megalite.launch import run_program
from megalite.training.program import main

if __name__ == "__main__":
    run_program(main)
