"""`tools/benchmark_growth.py`: the cost of each additional micro-batch, layer and rank.

The model is so small that most of a step is not arithmetic. Seconds are CPU seconds of a rank, which other programs
hardly affect. If each additional one costs the same, nothing in the trainer grows faster than linearly.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from megalite.config import Config
from megalite.prove.benchmark import measured
from megalite.races.loader_race import write_random_corpus
from megalite.races.machine_line import machine_line
from megalite.races.race_inputs import Shape, deepspeed_keys
from megalite.ranks.arguments import ArgumentParser, at_least

COUNTS: dict[str, tuple[int, ...]] = {
    "micro-batches": (1, 2, 4, 8, 16, 32),
    "layers": (2, 4, 8, 16, 24),
    "ranks": (1, 2, 4, 8),
}
LAYERS, MICRO_BATCHES = 4, 4  # when they are constant
VOCABULARY, LENGTH, TOKENS = 512, 64, 200_000


def main(arguments: list[str]) -> int:
    """Prints a table for each growing quantity; returns 0."""
    parser = ArgumentParser(
        "benchmark_growth.py",
        description="Measure the cost of each additional micro-batch, layer and rank.",
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"any of {', '.join(COUNTS)}")
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=9,
        metavar="N",
        help="timed steps per size",
    )
    options = parser.parse_args(arguments)
    for name in options.what:
        if name not in COUNTS:
            parser.error(f"WHAT: {name}: must be one of {', '.join(COUNTS)}")
    print(machine_line())
    with tempfile.TemporaryDirectory(prefix="growth_") as folder:
        corpus = Path(folder) / "corpus"
        write_random_corpus(corpus, TOKENS, 1000, VOCABULARY)
        for what in options.what or COUNTS:
            for line in rows(what, corpus, options.steps):
                print(line, flush=True)
    return 0


def rows(what: str, corpus: Path, steps: int) -> Iterator[str]:
    """The lines of a table: milliseconds per rank and step, and the increase for each additional one."""
    yield f"\n| {what} | ms of CPU time per step and rank | each additional one |"
    yield "|---|---|---|"
    before: tuple[int, float] | None = None
    for count in COUNTS[what]:
        ranks = measured(config_of(what, count, corpus), count if what == "ranks" else 1, steps)
        here = 1e3 * mean(median(rank["processor_seconds"]) for rank in ranks)
        further = "" if before is None else f"{(here - before[1]) / (count - before[0]):.3g}"
        yield f"| {count} | {here:.3g} | {further} |"
        before = count, here


def config_of(what: str, count: int, corpus: Path) -> Config:
    """A resolved config with `count` of `what`."""
    micro_batches = count if what == "micro-batches" else MICRO_BATCHES
    layers = count if what == "layers" else LAYERS
    ranks = count if what == "ranks" else 1
    shape = Shape(128, layers, 256, VOCABULARY, LENGTH)
    keys: dict[str, Any] = deepspeed_keys(micro_batches * ranks, 1, ranks, zero=1, bf16=False)
    keys["megalite"] = {
        "model": shape.config(),
        "data": {"train": [str(corpus)], "sequence_length": LENGTH},
        "train": {"steps": 1000, "run_dir": str(corpus.with_name("run"))},
    }
    return Config.from_dict(keys).resolve(ranks)
