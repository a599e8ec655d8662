"""Comparison of measured links with known ones (megalite/doctor/links.py)."""

import pytest

from megalite.doctor.links import known_share, share_words
from megalite.plan.device_figures import (
    DEVICES,
)
from megalite.plan.link_seconds import ring_seconds
from tests.unit.plan.test_calibration import LINK, MACHINE


def test_the_doctor_compares_links_with_known_ones() -> None:
    h100, size = DEVICES["H100"], 2**24
    expected = ring_seconds(h100.node, 8, size, passes=2)
    assert known_share(h100, 8, 1, 64, size, 2 * expected) == pytest.approx(0.5)
    across = ring_seconds(h100.network, 8, size, passes=2)
    assert known_share(h100, 8, 8, 64, size, across) == pytest.approx(1.0)
    shared = 4 * ring_seconds(LINK, 8, size, passes=2)  # 8 ranks on 2 cores
    assert known_share(MACHINE, 8, 1, 8, size, shared) == pytest.approx(1.0)
    assert share_words(h100, 0.9) == "90 % of the known rate of H100"
    assert share_words(h100, 0.2).startswith("20 % of the known rate of H100: slow: ")
