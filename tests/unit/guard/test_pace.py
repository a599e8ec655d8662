"""Which rank is called slow (megalite/guard/pace.py)."""

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megalite.config.limits import Faults
from megalite.guard import pace as room
from megalite.guard.pace import Pace


@pytest.mark.parametrize("ranks, named", [(1, 1), (1000, 0)])
def test_no_rank_is_called_slow_if_ranks_share_cores(ranks: int, named: int) -> None:
    pace = Pace.__new__(Pace)
    pace.faults = Faults.model_validate({"slow_looks": 1})
    pace.device, pace.hosts, pace.slow, pace.work = torch.device("cpu"), ["a", "a"], {}, 1.0
    pace.engine = SimpleNamespace(grid=SimpleNamespace(world_size=2))  # type: ignore[assignment]

    def gather(everyone: list[Any], own: Any) -> None:
        everyone[0].copy_(torch.tensor([1.0, 1.0, own[2]]))
        everyone[1].copy_(torch.tensor([9.0, 1.0, own[2]]))

    with (
        mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(ranks)}),
        mock.patch.object(torch, "get_num_threads", lambda: 1),
        mock.patch.object(room.dist, "all_gather", gather),
        mock.patch.object(room.RANK_CLOCK, "on", True),
    ):
        figures, lines = pace.end(10)
        more = [pace.end(step)[1] for step in (20, 30)]
    assert figures["slowest_rank"] == 1 and len(lines) == named
    assert more == [[], []] and all(len(seen) == 1 for seen in pace.slow.values()), "told once"
