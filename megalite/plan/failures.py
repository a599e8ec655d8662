"""Simulates failures of a long run: how often to save, and how much of the time is useful.

python -m megalite.plan.failures     prints the tables of docs/scale.md

Failures are a Poisson process whose rate grows with the number of ranks. A run works for `interval` seconds, then
stalls while it saves. A failure loses the work since the last complete checkpoint, and `restart` seconds pass until the
run works again. The best interval is found by simulation with common random numbers; Young's sqrt(2·C·M) (CACM 17(9),
1974) and Daly's higher-order form (FGCS 22(3), 2006) are the check.
"""

import math
import random
from dataclasses import dataclass

HOUR = 3600.0
DAY = 24 * HOUR
LLAMA_RANKS = 16_384
LLAMA_FAILURES = 419  # unexpected interruptions in 54 days (arXiv 2407.21783, table 5)
LLAMA_SECONDS = 54 * DAY
RANK_SECONDS = LLAMA_RANKS * LLAMA_SECONDS / LLAMA_FAILURES
"""Mean time between failures of one rank, from Llama 3's cluster: about 5.8 years."""


def mean_seconds_to_failure(ranks: int) -> float:
    """Mean seconds between failures of a run on `ranks` ranks."""
    return RANK_SECONDS / ranks


@dataclass(frozen=True)
class Saving:
    """Seconds. stall: that the steps wait for a checkpoint. write: until it is complete, in the background. restart:
    from a failure to the next step."""

    stall: float
    write: float
    restart: float


def young(saving: Saving, mean: float) -> float:
    """The best interval between checkpoints in seconds, to first order."""
    return math.sqrt(2 * saving.stall * mean)


def daly(saving: Saving, mean: float) -> float:
    """The same, to higher order."""
    ratio = saving.stall / (2 * mean)
    if ratio >= 1:
        return mean
    return (
        math.sqrt(2 * saving.stall * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - saving.stall
    )


def useful_share(
    interval: float, saving: Saving, mean: float, failures: int = 2000, seed: int = 0
) -> float:
    """The share of time spent on steps that are not lost, over `failures` failures."""
    draw, kept, passed = random.Random(seed), 0.0, 0.0
    period = interval + saving.stall
    for _ in range(failures):
        up = draw.expovariate(1 / mean)
        passed += up + saving.restart
        # A checkpoint counts once it is written, in the background of the following steps.
        kept += interval * max(0, math.floor((up - saving.write) / period))
    return kept / passed


def best_interval(saving: Saving, mean: float) -> tuple[float, float]:
    """The best (seconds between checkpoints, useful share) of 201 intervals from a tenth of Young's to ten times it."""
    first = young(saving, mean)
    intervals = [first * 10 ** (-1 + step / 100) for step in range(201)]
    share, interval = max(
        (useful_share(interval, saving, mean), interval) for interval in intervals
    )
    return interval, share


def table(saving: Saving) -> list[str]:
    """The table by number of ranks, in Markdown."""
    lines = [
        "| GPUs | a failure every | best interval, simulated | Young | Daly | useful time |",
        "|---|---|---|---|---|---|",
    ]
    for ranks in (64, 512, 1024, 4096, 8192, 16_384):
        mean = mean_seconds_to_failure(ranks)
        interval, share = best_interval(saving, mean)
        lines.append(
            f"| {ranks:,} | {mean / HOUR:,.1f} h | {interval / 60:.1f} min | {young(saving, mean) / 60:.1f} min | "
            f"{daly(saving, mean) / 60:.1f} min | {100 * share:.1f} % |"
        )
    return lines


BACKGROUND = Saving(stall=4.0, write=60.0, restart=600.0)
"""The state is copied in memory and written in the background. With 405 B parameters on 16,384 ranks each rank writes
0.3 GB."""
WAITING = Saving(stall=64.0, write=0.0, restart=600.0)
"""The same, but the steps wait until it is written."""

if __name__ == "__main__":
    print("\n".join(["In the background:", *table(BACKGROUND), "", "Waiting:", *table(WAITING)]))
