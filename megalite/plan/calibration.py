"""Turns measurements of a machine into the Device that predictions use (device_figures.py): pure functions.

Direct figures: rates of matrix products, memory and attention's core, the time of a kernel, and links (least squares
over all collectives). Other figures are fitted to measured steps of the real engine on one rank: the engine's overhead
per layer, micro-batch and step from models with little to compute, and what ZeRO-3 adds to it; `states_rate` from a
model with many weights for its tokens, `gradient_rate` from the same with several micro-batches, `reduce_rate` from
that with ZeRO-2, which reduces after each of them, and `product_share` from one with many tokens. On a CPU with several
cores, `pipe_share` is fitted to the CPU time of a step of two ranks. prove/calibrate.py measures. Next:
plan_program.py.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np

from megalite.config import Config
from megalite.model.families import read_spec
from megalite.plan.candidates import Search, given_candidate
from megalite.plan.device_figures import ENGINE_RATES, Device, Link
from megalite.plan.rank_memory import SizesByPlace
from megalite.plan.search import Planner

LARGE_PRODUCTS = 3  # the peak is the median rate of this many largest products of a dtype
SHARES = 0.2, 1.2  # range in which product_share is searched
PIPE_SHARES = 0.2, 1.0  # the same for pipe_share, which cannot exceed 1
MOST_GATHER_SECONDS = 0.1
HALVINGS, TURNS = 14, 4
SHARES_OF_LINK = {
    "all_gather": "gather",
    "reduce_scatter": "scatter",
    "reduce": "reduce",
    "send": "send",
}
"""Fields of Link, by collective. `reduce` is one call per rank, each of which gets a part."""
KINDS = ("all_reduce", *SHARES_OF_LINK)
SHARES_OF_BYTES = 0.25, 8.0  # plausible time of a byte relative to an all-reduce's

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Rows with their units in the names. products: dtype, m, k, n, seconds. pointwise, optimizer: moved_bytes,
    seconds. attention: dtype, flops, seconds. collectives: kind, ranks, bytes, seconds. steps: config, seconds.
    busy_share: see Device. pipe: config, and the seconds that a rank computes in a step with two pipe ranks; may be
    empty."""

    products: list[Row]
    pointwise: list[Row]
    attention: list[Row]
    optimizer: list[Row]
    collectives: list[Row]
    steps: list[Row]
    busy_share: float
    pipe: list[Row]


def fitted(start: Device, measured: Measured) -> Device:
    """`start` with its figures replaced by measured ones. Peak rates that it has (from a data sheet) are kept."""
    single, launch = product_rates(measured.products, "fp32")
    half, _ = product_rates(measured.products, "bf16")
    moved = [row["moved_bytes"] / row["seconds"] for row in measured.pointwise + measured.optimizer]
    core = median(row["flops"] / row["seconds"] for row in measured.attention)
    of_core = half if measured.attention[0]["dtype"] == "bf16" else single
    device = replace(
        start,
        single_flops=start.single_flops or single,
        half_flops=start.half_flops or half,
        memory_rate=median(moved),
        launch_seconds=launch,
        core_share=core / of_core,
        busy_share=measured.busy_share,
        product_share=1.0,
    )
    if measured.collectives:
        node, alone = links_of(measured.collectives, start.cores)
        device = replace(device, node=node, alone=alone)
    *small, gathering, reducing, summing, heavy, large = measured.steps
    device = with_engine_seconds(device, small)
    device = _met(device, "gather_seconds", (0.0, MOST_GATHER_SECONDS), gathering)
    # Each of these steps depends on all four figures: a few rounds of fitting converge.
    rates = device.memory_rate / 100, device.memory_rate
    device = replace(device, **dict.fromkeys(ENGINE_RATES, rates[1]))
    for _ in range(TURNS):
        device = _met(device, "product_share", SHARES, large)
        for name, step in zip(ENGINE_RATES, (summing, reducing, heavy), strict=True):
            device = _met(device, name, rates, step)
    for step in measured.pipe:
        device = _met(device, "pipe_share", PIPE_SHARES, step)
    return device


def product_rates(products: Sequence[Row], dtype: str) -> tuple[float, float]:
    """FLOP/s of the largest products of a dtype, and the overhead in seconds of the smallest."""
    flops = {
        2.0 * row["m"] * row["k"] * row["n"]: row["seconds"]
        for row in products
        if row["dtype"] == dtype
    }
    sizes = sorted(flops)
    rate = median(size / flops[size] for size in sizes[-LARGE_PRODUCTS:])
    return rate, max(0.0, flops[sizes[0]] - sizes[0] / rate)


def links_of(collectives: Sequence[Row], cores: int) -> tuple[Link, Link | None]:
    """The link of ranks that share cores, and that of ranks that do not. If only one kind was measured, the first is
    fitted to all and the second is None. cores: as in Device."""
    alone = [row for row in collectives if row["ranks"] <= cores]
    shared = [row for row in collectives if row["ranks"] > cores]
    if not alone or not shared or cores == 0:
        return _link_of(collectives), None
    return _link_of(shared), _link_of(alone)


def _link_of(collectives: Sequence[Row]) -> Link:
    """Bandwidth and latency that fit all collectives best, by relative error."""
    found = {row["kind"] for row in collectives}
    kinds = [kind for kind in KINDS if kind in found]
    (plain, *others), seconds = _collective_seconds(collectives, kinds)
    shares = {
        SHARES_OF_LINK[kind]: byte / max(plain, 1e-15)
        for kind, byte in zip(kinds[1:], others, strict=True)
    }
    least, most = SHARES_OF_BYTES
    if any(not least <= value <= most for value in shares.values()):
        # The measurements are too few or too noisy to tell the kinds apart.
        (plain,), seconds = _collective_seconds(collectives, kinds[:1])
        shares = {}
    return Link(1 / max(plain, 1e-15), seconds, **shares)


def _collective_seconds(
    collectives: Sequence[Row], kinds: Sequence[str]
) -> tuple[list[float], float]:
    """Seconds per byte of each kind (collectives of other kinds count as the first), and seconds per message."""
    rows = []
    for row in collectives:
        size, whole, kind = row["ranks"], row["bytes"], row["kind"]
        if kind == "send":
            sent, messages = float(whole), 1
        else:
            passes = 2 if kind == "all_reduce" else 1
            sent = passes * whole * (size - 1) / size
            ring = passes * min(size - 1, 2 * math.ceil(math.log2(size)))
            messages = size if kind == "reduce" else ring
        own = kinds.index(kind) if kind in kinds else 0
        bytes_ = [sent if number == own else 0.0 for number in range(len(kinds))]
        rows.append([part / row["seconds"] for part in (*bytes_, messages)])
    *bytes_, seconds = _not_negative(np.array(rows), np.ones(len(rows)))
    return bytes_, seconds


def with_engine_seconds(device: Device, steps: Sequence[Row]) -> Device:
    """Fits layer_seconds, micro_seconds and step_seconds to what steps take beyond their prediction without them."""
    names = ("layer_seconds", "micro_seconds", "step_seconds")
    device = replace(device, **dict.fromkeys(names, 0.0))
    base = np.array([predicted_seconds(device, row["config"]) for row in steps])
    # The prediction is linear in each: a column is what one second of it adds.
    columns = [
        np.array(
            [predicted_seconds(replace(device, **{name: 1.0}), row["config"]) for row in steps]
        )
        - base
        for name in names
    ]
    missing = np.array([row["seconds"] for row in steps]) - base
    found = _not_negative(np.stack(columns, axis=1), missing)
    return replace(device, **dict(zip(names, found, strict=True)))


def _met(device: Device, name: str, between: tuple[float, float], step: Row) -> Device:
    """`device` with the figure `name` set, by bisection, so that a step's prediction equals its measured time."""
    low, high = between
    rises = name.endswith("_seconds")  # the prediction rises with seconds and falls with a rate
    for _ in range(HALVINGS):
        value = (low + high) / 2
        longer = predicted_seconds(replace(device, **{name: value}), step["config"])
        low, high = (value, high) if (longer < step["seconds"]) == rises else (low, value)
    return replace(device, **{name: (low + high) / 2})


def predicted_seconds(device: Device, config: dict[str, Any]) -> float:
    """Predicted seconds that a rank computes in a step of a resolved config, without the bubble."""
    resolved, search, sizes = _searched(json.dumps(config))
    planner = Planner(search, device, device.memory_bytes, sizes)
    time = planner.layout(resolved, given_candidate(resolved)).time
    return time.seconds - time.parts["bubble"]


@lru_cache(maxsize=16)
def _searched(config: str) -> tuple[Config, Search, SizesByPlace]:
    """What all predictions of a config share."""
    resolved = Config.from_dict(json.loads(config))
    batch = resolved.train_batch_size
    return (
        resolved,
        Search(resolved, read_spec(resolved.model), resolved.world_size, batch),
        SizesByPlace(),
    )


def _not_negative(matrix: np.ndarray, values: np.ndarray) -> list[float]:
    """Least squares without negative results: drops the most negative column until none is negative."""
    kept = list(range(matrix.shape[1]))
    result = np.zeros(matrix.shape[1])
    while kept:
        found, *_ = np.linalg.lstsq(matrix[:, kept], values, rcond=None)
        if found.min() >= 0:
            result[kept] = found
            break
        kept.pop(int(found.argmin()))
    return [float(value) for value in result]
