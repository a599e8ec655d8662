"""Seconds of collectives: rings over the slowest link of an axis, bytes / rate + messages × latency each
(docs/layouts.md has the bytes). Next: work.py.
"""

import math
from dataclasses import replace
from functools import cache

from megalite.plan.device_figures import Device, Link


def link_along(device: Device, size: int, spacing: int) -> Link:
    """The link of an axis whose `size` ranks are `spacing` apart."""
    return link_of(device, size, max(1, device.node_ranks // spacing))


@cache
def link_of(device: Device, size: int, members: int) -> Link:
    """The link of a group of `size` ranks, of which at most `members` are in one node. If the group crosses nodes,
    the members of a node share their adapters."""
    if members >= size:
        return device.node
    rate = min(device.node.bytes_per_second, members * device.network.bytes_per_second)
    return replace(device.network, bytes_per_second=rate)


def ring_seconds(
    link: Link, size: int, whole: float, passes: int = 1, byte: float = 1.0, calls: float = 0.0
) -> float:
    """Seconds of a gather or scatter of `whole` bytes over `size` ranks; an all-reduce is two passes. byte: factor of
    the time per byte, from Link; calls: number of messages, if not those of a ring."""
    if size == 1:
        return 0.0
    # Rings, or trees if a ring would have more messages.
    messages = calls or passes * min(size - 1, 2 * math.ceil(math.log2(size)))
    sent = passes * whole * (size - 1) / size
    return byte * sent / link.bytes_per_second + messages * link.seconds


def gather_seconds(link: Link, size: int, whole: float) -> float:
    """Seconds of an all-gather of `whole` bytes."""
    return ring_seconds(link, size, whole, byte=link.gather)


def scatter_seconds(link: Link, size: int, whole: float) -> float:
    """Seconds of a reduce-scatter of `whole` bytes."""
    return ring_seconds(link, size, whole, byte=link.scatter)


def owners_seconds(link: Link, size: int, whole: float, buckets: float = 1.0) -> float:
    """Seconds of reducing `whole` bytes in `buckets` buckets, with one call for each rank's part of each."""
    return ring_seconds(link, size, whole, byte=link.reduce, calls=size * buckets)
