"""Contender: the whole training program, with everything around a step (agreement, health, metrics)."""

from typing import Any

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.races.race_turns import Turns, request
from megalite.ranks.run_program import run_program
from megalite.training import pretraining as program


def main(arguments: list[str]) -> int:
    """Trains until the race is over."""
    turns, train = Turns(), program._train

    def train_in_turns(prepared: Any, rank: int) -> int:
        from megalite.training import loop  # as in the program, after the ranks have started

        class TakingTurns(loop.Run):
            def _step(self) -> loop.Agreed:
                turns.begin()
                agreed = super()._step()
                turns.end(self.health.loss)
                return agreed

        loop.Run = TakingTurns
        return train(prepared, rank)

    program._train = train_in_turns
    return program.main(["--deepspeed_config", request()["config"]])


if __name__ == "__main__":
    run_program(main)
