"""Compares a measured all-reduce with the known rate of its axis's link (plan/device_figures.py, or a calibration)."""

from megalite.plan.device_figures import Device
from megalite.plan.link_seconds import link_along, ring_seconds

SLOW = 0.5  # share of the known rate below which an axis is a finding


def known_share(
    known: Device, size: int, spacing: int, world: int, bytes_: int, seconds: float
) -> float:
    """The share of the known rate that an all-reduce of `bytes_` in `seconds` reaches. size: ranks of the axis, which
    are `spacing` apart. world: all ranks, which do the same at once and may share cores."""
    expected = ring_seconds(link_along(known, size, spacing), size, bytes_, passes=2)
    return expected * known.ranks_a_core(world) / seconds


def share_words(known: Device, share: float) -> str:
    """The share as text."""
    words = f"{100 * share:.0f} % of the known rate of {known.name}"
    if share < SLOW:
        words += ": slow: check its links and their other users"
    return words
