"""Continues prompts with a trained model on the ranks that `deepspeed` (or torchrun, or srun) starts; see --help."""

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.inference.generate_program import generate_main
from megalite.ranks.launch import run_program

if __name__ == "__main__":
    run_program(generate_main)
