"""The races of `tools/benchmark_peers.py`: their contenders and their output.

A ratio is the peer's seconds divided by ours: above 1 ours is faster. CPU seconds ("processor") are summed over all
ranks, and other programs hardly affect them. If ranks wait for each other, those of the busiest rank decide
("busiest").
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megalite.errors import UserError
from megalite.races import head_race, loader_race
from megalite.races.machine_line import machine_line
from megalite.races.race_inputs import (
    SMALL,
    WIDE,
    Shape,
    deepspeed_keys,
    make_inputs,
    our_keys,
    peer_request,
    write_json,
)
from megalite.races.referee import Contender, Step, Team, race, spread
from megalite.ranks.arguments import ArgumentParser, at_least

TOLERANCE = {False: 1e-4, True: 3e-3}  # relative, of the losses; key: whether bf16
Figure = Callable[[Step], float]


def total(step: Step) -> float:
    """CPU seconds of all ranks."""
    return sum(step.processor)


def busiest(step: Step) -> float:
    """CPU seconds of the busiest rank."""
    return max(step.processor)


def wall(step: Step) -> float:
    """Wall-clock seconds."""
    return step.wall


FIGURES: dict[str, Figure] = {"processor": total, "busiest": busiest, "wall": wall}


@dataclass(frozen=True)
class Race:
    """told: a description. shape: of the model. batch: samples per step. micro: samples per micro-batch. make: returns
    the contenders, ours first, from a folder with the inputs. figure: the deciding one (a key of FIGURES)."""

    description: str
    shape: Shape
    batch: int
    micro: int
    bf16: bool
    make: Callable[["Race", Path], list[Contender]]
    figure: str = "processor"


def _ours(
    race_: Race, folder: Path, ranks: int, zero: int, data: int, **parallel: Any
) -> Contender:
    keys = our_keys(
        folder, race_.shape, race_.batch, race_.micro, data, zero, race_.bf16, **parallel
    )
    config = write_json(folder / "ours.json", keys)
    return Contender(f"megalite, ZeRO-{zero}", "megalite.races.ours", ranks, {"config": config})


def _peer(
    race_: Race, folder: Path, name: str, module: str, ranks: int, threads: int = 1, **more: Any
) -> Contender:
    asked = peer_request(folder, race_.batch, race_.micro, race_.bf16, **more)
    return Contender(name, f"megalite.races.{module}", ranks, asked, threads)


def _alone(race_: Race, folder: Path) -> list[Contender]:
    # DeepSpeed's ZeRO-0 does not support 16 bits.
    return [
        _ours(race_, folder, 1, int(race_.bf16), 1),
        _peer(race_, folder, "autocast" if race_.bf16 else "plain PyTorch", "plain", 1),
    ]


def _alone_zero_1(race_: Race, folder: Path) -> list[Contender]:
    return [_ours(race_, folder, 1, 1, 1), _peer(race_, folder, "plain PyTorch", "plain", 1)]


def _data(zero: int) -> Callable[[Race, Path], list[Contender]]:
    def make(race_: Race, folder: Path) -> list[Contender]:
        keys = deepspeed_keys(race_.batch, race_.micro, 2, zero, race_.bf16)
        theirs = write_json(folder / "theirs.json", keys)
        trainer, output = f"Trainer + DeepSpeed, ZeRO-{zero}", str(folder / "trainer")
        return [
            _ours(race_, folder, 2, zero, 2),
            _peer(race_, folder, trainer, "trainer", 2, deepspeed=theirs, output=output),
            _peer(race_, folder, "FSDP2", "fsdp", 2, reshard=zero == 3),
        ]

    return make


def _pipe(race_: Race, folder: Path) -> list[Contender]:
    keys = deepspeed_keys(race_.batch, race_.micro, 1, 0, race_.bf16)
    theirs, cut = write_json(folder / "theirs.json", keys), race_.shape.layers * 2 // 3
    return [
        _ours(race_, folder, 2, 0, 1, pipe=2),
        _peer(race_, folder, "torch 1F1B", "torch_pipe", 2, cut=cut),
        _peer(
            race_,
            folder,
            "DeepSpeed PipelineEngine",
            "deepspeed_pipe",
            2,
            cut=cut,
            deepspeed=theirs,
        ),
    ]


def _tensor(race_: Race, folder: Path) -> list[Contender]:
    return [
        _ours(race_, folder, 2, 0, 1, tensor=2),
        _peer(race_, folder, "one process, 2 threads", "plain", 1, threads=2),
        _peer(race_, folder, "DTensor, loss_parallel", "dtensor", 2),
    ]


RACES = {
    "one-fp32": Race("one process, fp32, 34 M", SMALL, 1, 1, False, _alone),
    "one-zero1": Race(
        "one process, fp32, 34 M, ours with ZeRO-1", SMALL, 1, 1, False, _alone_zero_1
    ),
    "one-bf16": Race("one process, bf16, 34 M", SMALL, 2, 2, True, _alone),
    "one-wide": Race("one process, fp32, 55 M", WIDE, 1, 1, False, _alone),
    "data-zero1": Race("data 2, fp32, 34 M", SMALL, 2, 1, False, _data(1)),
    "data-zero2": Race("data 2, fp32, 34 M", SMALL, 2, 1, False, _data(2)),
    "data-zero3": Race("data 2, fp32, 34 M", SMALL, 2, 1, False, _data(3)),
    "pipe": Race("pipe 2, 8 micro-batches, fp32, 34 M", SMALL, 8, 1, False, _pipe, "busiest"),
    "tensor": Race("tensor 2, fp32, 34 M", SMALL, 2, 2, False, _tensor, "wall"),
}
OTHERS = {"head": head_race.main, "loader": loader_race.main}


def main(arguments: list[str]) -> int:
    """Runs races and prints them; returns 0. Raises UserError with one line."""
    parser = ArgumentParser(
        "benchmark_peers.py", description="Compare the speed of training with other programs."
    )
    parser.add_argument(
        "rows",
        nargs="+",
        choices=[*RACES, *OTHERS],
        metavar="ROW",
        help=", ".join([*RACES, *OTHERS]),
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="timed steps")
    parser.add_argument("--warmup", type=at_least(1), default=2, metavar="N", help="warm-up steps")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    print(machine_line(), flush=True)
    for row in options.rows:
        if row in OTHERS:
            OTHERS[row](options.rounds)
        else:
            _run(row, RACES[row], options.rounds, options.warmup)
    return 0


def _run(name: str, race_: Race, rounds: int, warmup: int) -> None:
    tokens = race_.batch * race_.shape.length
    print(
        f"\n{name}: {race_.description}, {tokens:,} tokens per step, {rounds} rounds after {warmup}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="peers_") as folder:
        make_inputs(Path(folder), race_.shape, race_.batch, rounds + warmup)
        teams = race(race_.make(race_, Path(folder)), rounds, warmup)
    print("\n".join(report(race_, teams)), flush=True)


def report(race_: Race, teams: list[Team]) -> list[str]:
    """One line per contender. Raises UserError if the losses differ, since then they did not do the same work."""
    ours, lines = teams[0], []
    width = max(len(team.contender.name) for team in teams)
    for team in teams:
        apart = max(
            abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(ours.steps, team.steps, strict=True)
        )
        if apart > TOLERANCE[race_.bf16]:
            pairs = [
                f"{a.loss:.5f} {b.loss:.5f}" for a, b in zip(ours.steps, team.steps, strict=True)
            ]
            raise UserError(
                f"{team.contender.name}: losses differ from ours by {apart:.1e}: {', '.join(pairs)}"
            )
        line = f"{team.contender.name:{width}}  loss {team.steps[-1].loss:.4f}"
        line += f"  start {sum(team.start_processor):5.1f} processor s, {team.start_wall:5.1f} s"
        line += f"  peak {team.peak_bytes / 1e6:6,.0f} MB"
        for name, figure in FIGURES.items():
            line += f"  {name} {spread([figure(step) for step in team.steps])}"
        lines.append(line)
    for team in teams[1:]:
        lines.append(
            f"{'ratio to ' + team.contender.name:{width + 9}}  {ratios(race_.figure, ours, team)}"
        )
    return lines


def ratios(deciding: str, ours: Team, theirs: Team) -> str:
    """Ratios of the peer's median to ours, with the minimum and maximum over the rounds; also of start-up and
    memory."""
    parts = []
    for name, figure in FIGURES.items():
        pairs = [figure(b) / figure(a) for a, b in zip(ours.steps, theirs.steps, strict=True)]
        middle = median(figure(step) for step in theirs.steps) / median(
            figure(step) for step in ours.steps
        )
        mark = "*" if name == deciding else ""
        parts.append(f"{mark}{name} {middle:.3f} ({min(pairs):.3f}-{max(pairs):.3f}){mark}")
    start = sum(ours.start_processor) / sum(theirs.start_processor)
    memory = ours.peak_bytes / theirs.peak_bytes
    return "  ".join(
        [*parts, f"start ours/theirs {start:.2f}", f"peak memory ours/theirs {memory:.2f}"]
    )
