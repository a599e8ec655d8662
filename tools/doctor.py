#!/usr/bin/env python3
"""Look at the hosts of a run before it starts; see --help."""

from megalite.doctor.program import main
from megalite.launch import run_program

if __name__ == "__main__":
    run_program(main)
