"""Collectives on the timeline (megalite/engine/collective_spans.py), with stubs for the functions of
torch.distributed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.comm import comm

from megalite.engine.collective_spans import recording_collectives
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.timeline import RANK_TIMELINE


class Group:
    """A process group with a name."""

    def __init__(self, name: str) -> None:
        self.group_name = name


TENSOR, ELSEWHERE = Group("1"), Group("2")
GRID = Grid(tensor=Axis(2, 0, (0, 1), TENSOR, name="tensor"))


def all_reduce(tensor: Any, op: Any = None, group: Any = None, async_op: bool = False) -> str:
    return "reduced"


def gather(output: Any, tensor: Any, group: Any = None) -> str:
    return "gathered"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """DeepSpeed's backend, which keeps a reference to one of the two functions."""
    made = SimpleNamespace(all_gather_function=gather, reduce_scatter_function=None)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(comm, "cdb", made)
    return made


def test_collectives_are_named_by_function_and_axis(backend: SimpleNamespace) -> None:
    RANK_TIMELINE.begin(torch.device("cpu"))
    with recording_collectives(GRID):
        assert dist.all_reduce(None, None, TENSOR) == "reduced"
        assert dist.all_reduce(None) == "reduced"
        assert backend.all_gather_function(None, None, group=TENSOR) == "gathered"
        dist.all_reduce(None, group=ELSEWHERE)  # such as the saver's thread
        dist.all_reduce(None, group=TENSOR, async_op=True)
    spans = RANK_TIMELINE.take(wait=True)
    assert {span.kind for span in spans} == {"collective"}
    wanted = [("all_reduce", "tensor"), ("all_reduce", "world"), ("gather", "tensor")]
    assert [span.what for span in spans] == wanted


def test_everything_is_put_back_after_an_error_too(backend: SimpleNamespace) -> None:
    with pytest.raises(KeyError), recording_collectives(GRID):
        assert dist.all_reduce is not all_reduce and backend.all_gather_function is not gather
        raise KeyError
    assert dist.all_reduce is all_reduce and backend.all_gather_function is gather
    assert backend.reduce_scatter_function is None
