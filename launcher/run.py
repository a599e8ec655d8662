"""Starts one of its neighbours with `deepspeed`, and sees to its end; see --help."""

from megalite.launch import run_program
from megalite.launching.supervisor import main

if __name__ == "__main__":
    run_program(main)
