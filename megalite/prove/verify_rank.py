"""One rank of tools/verify_layouts.py: `python -m megalite.prove.verify_rank REQUEST`, started by verify.py."""

import json
from pathlib import Path
from typing import Any

from megalite.config import Config
from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.run_program import run_program


def main(arguments: list[str]) -> int:
    """Records all runs of the request."""
    request: dict[str, Any] = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    start_ranks(lambda thorough: None)
    # After start_ranks, which sets the environment that DeepSpeed reads on import.
    from megalite.prove.mutants import mutants
    from megalite.prove.trace import no_plant, record

    for run in request["runs"]:
        config = Config.from_dict(run["config"])
        plant = mutants(config)[run["mutant"]] if run.get("mutant") else no_plant
        record(config, request["steps"], Path(run["folder"]), plant)
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_program(main)
