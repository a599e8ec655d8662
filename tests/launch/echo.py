"""A program for launchers that writes what reached it: FILE, then words; the variables that begin with HF_OWN."""

import json
import os
from pathlib import Path

from megalite.ranks.run_program import run_program


def main(arguments: list[str]) -> int:
    words = [word for word in arguments if not word.startswith("--local_rank")]
    values = {
        name: value for name, value in os.environ.items() if name.startswith(("HF_OWN", "NCCL_OWN"))
    }
    Path(f"{words[0]}{os.environ['RANK']}").write_text(json.dumps([words[1:], values]))
    return 0


if __name__ == "__main__":
    run_program(main)
