"""One rank of a calibration: `python -m megalite.prove.calibrate_rank REQUEST`; see calibrate.py."""

import json
from pathlib import Path
from typing import Any

from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.run_program import run_program


def main(arguments: list[str]) -> int:
    """Runs the measurement of the request and writes the result into its folder."""
    request: dict[str, Any] = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    here, _ = start_ranks(lambda thorough: None)
    from megalite.prove.machine_rates import measured  # after start_ranks has set the environment

    result = measured(request["what"], request["configs"])
    (Path(request["folder"]) / f"rank{here.rank}.json").write_text(json.dumps(result))
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_program(main)
