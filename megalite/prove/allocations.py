"""What torch allocates, on a CPU too."""

from collections.abc import Callable

import torch


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch allocates at a time in `work`, by its profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    now = highest = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            highest = max(highest, now)
    return highest
