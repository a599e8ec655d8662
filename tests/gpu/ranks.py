"""Ranks of their own processes that call a function of work.py: `python -m tests.gpu.ranks REQUEST` is one.

tests/ranks.py forks its ranks from a process that hides the GPUs, and a process that has used CUDA cannot be forked.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.local import run_local_ranks
from megalite.ranks.run_program import run_program


def on_ranks(
    ranks: int, function: str, *, accelerator: str | None = None, **arguments: Any
) -> list[Any]:
    """What a function of work.py returns on each rank. accelerator: DeepSpeed's name of it, None: the machine's."""
    settings = {} if accelerator is None else {"DS_ACCELERATOR": accelerator}
    with (
        tempfile.TemporaryDirectory(prefix="gpu_") as folder,
        mock.patch.dict(os.environ, settings),
    ):
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"function": function, "arguments": arguments}))
        run_local_ranks(ranks, "tests.gpu.ranks", [str(request)])
        return [
            json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)
        ]


def main(arguments: list[str]) -> int:
    request = Path(arguments[0])
    asked = json.loads(request.read_text())
    here, _ = start_ranks(lambda thorough: None)
    from tests.gpu import work  # after start_ranks, which sets what DeepSpeed's import reads

    result = getattr(work, asked["function"])(**asked["arguments"])
    (request.parent / f"rank{here.rank}.json").write_text(json.dumps(result))
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_program(main)
