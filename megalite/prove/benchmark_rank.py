"""One rank of tools/benchmark_step.py: `python -m megalite.prove.benchmark_rank REQUEST`; see benchmark.py."""

import json
from pathlib import Path
from typing import Any

from megalite.config import Config
from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.run_program import run_program


def main(arguments: list[str]) -> int:
    """Runs the measurement of the request and writes the result into its folder."""
    request: dict[str, Any] = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    here, _ = start_ranks(lambda thorough: None)
    from megalite.prove.measure import (  # after start_ranks has set the environment
        measure_layout,
        measure_plain,
    )

    measure = measure_plain if request["plain"] else measure_layout
    result = measure(Config.from_dict(request["config"]), request["steps"])
    (Path(request["folder"]) / f"rank{here.rank}.json").write_text(json.dumps(result))
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_program(main)
