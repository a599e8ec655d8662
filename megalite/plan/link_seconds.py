"""Seconds of a message and of a collective between ranks: rings over the slowest link of their axis, each bytes / rate
+ messages × latency (docs/layouts.md has the bytes). Next: work.py.
"""

import math
from dataclasses import replace
from functools import cache

from megalite.plan.devices import Device, Link


def link_along(device: Device, size: int, spacing: int) -> Link:
    """The link of an axis of `size` ranks that are `spacing` apart."""
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
    """Of a gather or scatter of `whole` bytes over `size` ranks; an all-reduce is two passes. byte: how many times as
    long a byte takes, of Link; calls: messages, if not those of a ring."""
    if size == 1:
        return 0.0
    # Rings, or trees where rings would be long.
    messages = calls or passes * min(size - 1, 2 * math.ceil(math.log2(size)))
    sent = passes * whole * (size - 1) / size
    return byte * sent / link.bytes_per_second + messages * link.seconds


def gather_seconds(link: Link, size: int, whole: float) -> float:
    """Of an all-gather."""
    return ring_seconds(link, size, whole, byte=link.gather)


def scatter_seconds(link: Link, size: int, whole: float) -> float:
    """Of a reduce-scatter."""
    return ring_seconds(link, size, whole, byte=link.scatter)


def owners_seconds(link: Link, size: int, whole: float, buckets: float = 1.0) -> float:
    """Of reducing `whole` bytes in so many buckets, with one call for the part of each rank."""
    return ring_seconds(link, size, whole, byte=link.reduce, calls=size * buckets)
