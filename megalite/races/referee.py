"""Starts contenders, lets them take steps in turn, and keeps the time. Next: races.py."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megalite.errors import MegaliteError
from megalite.races.race_turns import PIPES
from megalite.ranks.local import free_port

PATIENCE_SECONDS = 900.0  # for one answer
SHOWN_CHARACTERS = 3000


class RaceFailed(MegaliteError):
    """A contender exited, or did not answer in time."""


@dataclass(frozen=True)
class Contender:
    """module: runs in `ranks` processes. request: read by `turns.request`. threads: per process."""

    name: str
    module: str
    ranks: int
    request: dict[str, Any]
    threads: int = 1


@dataclass
class Step:
    """One step of a contender. processor: CPU seconds by rank. wall: seconds of the slowest rank. loss: mean over the
    ranks that know it."""

    processor: list[float]
    wall: float
    loss: float


@dataclass
class Team:
    """The running ranks of a contender. steps: all so far. peak_bytes: resident, of the largest rank. start_wall,
    start_processor: seconds from the start of the processes to the end of the first step, the latter by rank."""

    contender: Contender
    folder: Path
    steps: list[Step] = field(default_factory=list)
    peak_bytes: int = 0
    start_wall: float = 0.0
    start_processor: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ranks: list[tuple[subprocess.Popen[bytes], Any, Any]] = []
        self._started = time.perf_counter()

    def start(self) -> None:
        """Starts the ranks, which then wait for their first turn."""
        contender, request = self.contender, self.folder / "request.json"
        request.write_text(json.dumps(contender.request))
        port = free_port()
        self._started = time.perf_counter()
        for rank in range(contender.ranks):
            go_read, go_write = os.pipe()
            answered, answer = os.pipe()
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(contender.ranks),
                "LOCAL_WORLD_SIZE": str(contender.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(contender.threads),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                PIPES: f"{go_read},{answer}",
            }
            command = [sys.executable, "-m", contender.module, str(request)]
            with self._output(rank).open("wb") as file:
                process = subprocess.Popen(
                    command,
                    env=env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=(go_read, answer),
                )
            os.close(go_read)
            os.close(answer)
            self._ranks.append((process, os.fdopen(go_write, "w"), os.fdopen(answered)))

    def _output(self, rank: int) -> Path:
        return self.folder / f"rank{rank}"

    def step(self) -> Step:
        """Lets the team take one step."""
        for _, go_write, _ in self._ranks:
            print("go", file=go_write, flush=True)
        answers = [self._answer(rank) for rank in range(len(self._ranks))]
        if not self.steps:
            self.start_wall = time.perf_counter() - self._started
            self.start_processor = [answer["since_start"] for answer in answers]
        losses = [answer["loss"] for answer in answers if answer["loss"] is not None]
        processor = [answer["processor"] for answer in answers]
        wall = max(answer["wall"] for answer in answers)
        self.steps.append(Step(processor, wall, sum(losses) / len(losses)))
        self.peak_bytes = max(answer["peak_bytes"] for answer in answers)
        return self.steps[-1]

    def _answer(self, rank: int) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            ready, _, _ = select.select([self._ranks[rank][2]], [], [], 1.0)
            line = self._ranks[rank][2].readline() if ready else None
            if line:
                return json.loads(line)
            dead = next(
                (i for i, (process, _, _) in enumerate(self._ranks) if process.poll() is not None),
                None,
            )
            if line == "" or dead is not None:
                said = (
                    self._output(dead or 0).read_text(errors="replace").strip()[-SHOWN_CHARACTERS:]
                )
                raise RaceFailed(f"{self.contender.name}: rank {dead or 0} exited: {said}")
        raise RaceFailed(
            f"{self.contender.name}: rank {rank} did not answer within {PATIENCE_SECONDS:.0f} s"
        )

    def stop(self) -> None:
        """Ends the ranks."""
        for process, go_write, answered in self._ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
            go_write.close()
            answered.close()


def race(contenders: Sequence[Contender], rounds: int, warmup: int) -> list[Team]:
    """Runs `rounds` steps of each contender after `warmup` ones; the order of contenders alternates."""
    with tempfile.TemporaryDirectory(prefix="race_") as folder:
        teams = []
        for number, contender in enumerate(contenders):
            own = Path(folder) / str(number)
            own.mkdir()
            teams.append(Team(contender, own))
        try:
            for team in teams:
                team.start()
                team.step()  # starts do not overlap
            for number in range(1, warmup + rounds):
                for team in teams if number % 2 else teams[::-1]:
                    team.step()
        finally:
            for team in teams:
                team.stop()
    for team in teams:
        team.steps = team.steps[warmup:]
    return teams


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum."""
    return f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
