"""A contender's side of a race: it waits for its turn, then reports the time of the step. Does not import torch.

Each rank waits for its turn on one pipe and answers on another; the race is over when the first pipe is closed.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIPES = "RACE_PIPES"  # environment variable: the numbers of both, separated by a comma


def request() -> dict[str, Any]:
    """This contender's request: the JSON file named by its command line."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


class Turns:
    """The turns of one rank. A step is the time between `begin` and `end`, or one call of the function given to
    `serve`."""

    def __init__(self) -> None:
        told, answered = map(int, os.environ[PIPES].split(","))
        self._told, self._answered = os.fdopen(told), os.fdopen(answered, "w")
        self._wall = self._processor = 0.0

    def begin(self) -> None:
        """Waits for this rank's turn. Exits the process if the race is over."""
        if not self._told.readline():
            os._exit(0)
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def end(self, loss: float | None) -> None:
        """Reports a step. loss: a mean in nats; None on a rank that does not know it."""
        processor, wall = time.process_time() - self._processor, time.perf_counter() - self._wall
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = {
            "processor": processor,
            "wall": wall,
            "loss": loss,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "since_start": time.process_time() + children.ru_utime + children.ru_stime,
        }
        print(json.dumps(answer), file=self._answered, flush=True)

    def serve(self, step: Callable[[int], float | None]) -> None:
        """Takes all turns: step(0), step(1) …; each returns the loss."""
        number = 0
        while True:
            self.begin()
            self.end(step(number))
            number += 1
