"""Explains the planner's answer: why the first layout is best, what would change that, and what to do if none fits.

Next: plan_program.py.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.plan.candidates import Search
from megalite.plan.device_figures import GIB
from megalite.plan.search import Found, PlannedLayout, Planner

WORDS = {
    "products": "products",
    "attention": "attention",
    "memory": "memory-bound work",
    "again": "recomputed forwards",
    "tensor": "messages of the tensor axis",
    "engine": "summing gradients",
    "data": "messages of the data axis",
    "expert": "messages of the expert axis",
    "context": "messages of the context axis",
    "update": "the update",
    "bubble": "the bubble",
}
NEAR = 0.005  # shares of a step below this are not shown


def why(layouts: list[PlannedLayout]) -> str:
    """Compares the first layout with the next one that has other axis sizes or another ZeRO stage."""
    first = layouts[0]
    others = [layout for layout in layouts[1:] if axes_of(layout) != axes_of(first)]
    spent = sorted(first.time.parts.items(), key=lambda part: -part[1])
    shares = [
        f"{WORDS[name]} {100 * seconds / first.time.seconds:.0f} %"
        for name, seconds in spent
        if seconds > NEAR * first.time.seconds
    ]
    line = f"first: {first.candidate}: {', '.join(shares)}"
    if not others:
        return line
    other = others[0]
    slower = other.time.seconds - first.time.seconds
    losses = {name: other.time.parts[name] - seconds for name, seconds in first.time.parts.items()}
    told = [
        f"{difference:+.3g} s in {WORDS[name]}"
        for name, difference in sorted(losses.items(), key=lambda part: -abs(part[1]))
        if abs(difference) > NEAR * first.time.seconds
    ]
    reason = ", ".join(told[:3]) or "small differences everywhere"
    return (
        f"{line}\nnext with other axes: {other.candidate}: {slower:+.3g} s "
        f"({100 * slower / first.time.seconds:.1f} %): {reason}"
    )


def axes_of(layout: PlannedLayout) -> tuple[int, ...]:
    """The sizes of the axes, and ZeRO's stage."""
    one = layout.candidate
    return one.pipe, one.tensor, one.context, one.expert, one.zero


def changes(planner: Planner, found: Found) -> Iterator[str]:
    """Changes of memory or network that would make another layout the best."""
    first = found.layouts[0]
    if found.too_large:
        best = found.too_large[0]
        missing = (best.memory.total - planner.memory_bytes) / GIB
        gain = 100 * (1 - best.time.seconds / first.time.seconds)
        yield f"with {missing:.1f} GiB more per rank: {best.candidate} ({gain:.1f} % faster)"
    device, network = planner.device, planner.device.network
    for words, factor in (("half", 0.5), ("twice", 2.0)):  # the rate of the network
        link = replace(network, bytes_per_second=factor * network.bytes_per_second)
        other = Planner(
            planner.search, replace(device, network=link), planner.memory_bytes, planner.sizes
        )
        again = [other.again(layout) for layout in found.layouts]
        best = min(again, key=lambda layout: layout.time.seconds)
        if axes_of(best) != axes_of(first):
            yield f"with {words} the network bandwidth: {best.candidate}"


def given_line(given: PlannedLayout, first: PlannedLayout, memory_bytes: float) -> str:
    """Compares the config's own layout with the first one."""
    slower = 100 * (given.time.seconds / first.time.seconds - 1)
    size = given.memory.total / GIB
    fits = (
        ""
        if given.memory.total <= memory_bytes
        else f", {size - memory_bytes / GIB:.1f} GiB too much"
    )
    return (
        f"the config's own: {given.candidate}: {given.time.seconds:.4g} s per step ({slower:+.1f} %), "
        f"{size:.1f} GiB{fits}"
    )


def none_fits(planner: Planner) -> ConfigError:
    """The error if no layout fits: by how much the smallest is too large, and what would free the most memory."""
    smallest = planner.smallest()
    needed, room = smallest.memory.total / GIB, planner.memory_bytes / GIB
    freed = {
        words: needed - _least_bytes(planner, search) / GIB for words, search in _levers(planner)
    }
    words = max(freed, key=lambda words: freed[words])
    return ConfigError(
        f"--world-size: {planner.search.world_size}: no layout fits: the smallest ({smallest.candidate}) takes "
        f"{needed:.1f} GiB on rank {smallest.memory.rank}, {needed - room:.1f} GiB more than the {room:.1f} GiB of "
        f"{planner.device.name}: {words} would free the most, about {max(0.0, freed[words]):.1f} GiB"
    )


def _levers(planner: Planner) -> Iterator[tuple[str, Search]]:
    """Changes that save memory and are not part of a layout."""
    search = planner.search
    yield "twice the ranks", replace(search, world_size=2 * search.world_size)
    length = search.config.data.sequence_length
    if length > 1:
        document = copy.deepcopy(search.config.to_json())
        document["megalite"]["data"]["sequence_length"] = length // 2
        words = f"megalite.data.sequence_length {length // 2}"
        yield words, replace(search, config=Config.from_dict(document))
    if search.config.precision == "fp32":
        document = {**search.config.to_json(), "bf16": {"enabled": True}}
        yield "bf16", replace(search, config=Config.from_dict(document))


def _least_bytes(planner: Planner, search: Search) -> float:
    """Bytes per rank of the smallest layout of another search."""
    try:
        return Planner(search, planner.device, planner.memory_bytes).smallest().memory.total
    except ConfigError:  # it has no layout at all
        return float("inf")
