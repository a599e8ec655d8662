"""Formats figures for people."""

import math
import time

TICKS = 5  # of an axis


def short(value: float) -> str:
    """Four digits and a prefix: 12.3 k, 1.234, 5e-05."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:.4g}"


def gib(size: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size:.0f} B"


def percent(share: float) -> str:
    """A share of 1 in per cent."""
    return f"{100 * share:.3g} %"


def clock(seconds: float) -> str:
    """h:mm:ss"""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def date(unix_seconds: float) -> str:
    """Local date and time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers in [low, high], evenly spaced."""
    if not high > low:
        return [low]
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
