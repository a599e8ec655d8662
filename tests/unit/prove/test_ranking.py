"""The agreement of two rankings, and which layouts may be ranked (megalite/prove/ranking.py)."""

import pytest

from megalite.errors import ConfigError
from megalite.prove.ranking import kendall_tau, main


def test_rankings() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [40, 30, 20, 10]) == -1
    assert kendall_tau([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(4 / 6)


def test_layouts_to_rank_are_checked_first() -> None:
    with pytest.raises(ConfigError, match="--layouts: data=2: must be two or more, to be ranked"):
        main(["--layouts", "data=2"])
    with pytest.raises(ConfigError, match="--layouts: data=4096: 4096 ranks: must be at most"):
        main(["--layouts", "data=2", "data=4096"])
