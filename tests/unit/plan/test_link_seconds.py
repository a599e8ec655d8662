"""The link of an axis, and seconds on it."""

import pytest

from megalite.plan.device_figures import DEVICES, Link
from megalite.plan.link_seconds import link_along, ring_seconds

H100 = DEVICES["H100"]


def test_ranks_of_a_node_share_its_adapters() -> None:
    """Four ranks of a node in one data group share four adapters; a group within a node uses none."""
    assert link_along(H100, 64, 2).bytes_per_second == 4 * H100.network.bytes_per_second
    assert link_along(H100, 4, 2) == H100.node
    assert link_along(H100, 64, 16) == H100.network


def test_a_ring_sends_all_parts_but_its_own() -> None:
    link = Link(1e9, 1e-3)
    assert ring_seconds(link, 4, 1e9) == pytest.approx(0.75 + 3e-3)
    assert ring_seconds(link, 4, 1e9, passes=2) == pytest.approx(1.5 + 6e-3)
    assert ring_seconds(link, 1, 1e9) == 0
