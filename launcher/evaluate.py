"""Scores a trained model on a corpus on the ranks that `deepspeed` (or torchrun, or srun) starts; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.inference.evaluate_program import evaluate_main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(evaluate_main)
