"""Continues prompts with a trained model on the ranks that `deepspeed` (or torchrun, or srun) starts; see --help."""

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.inference.generate_program import generate_main
from megalite.ranks.run_program import run_program

if __name__ == "__main__":
    run_program(generate_main)
