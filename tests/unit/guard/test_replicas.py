"""Copies of a weight that must be equal bit for bit (megalite/guard/replicas.py); the ranks are simulated in turn."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalite.guard import replicas
from megalite.guard.replicas import ReplicaDifference, Replicas
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from tests.small_models import MODELS

CPU = torch.device("cpu")
NAME = "layers.1.mlp.up.weight"


class Ranks:
    """Replaces torch.distributed: computes from the other ranks' stages what they would send."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, stages: list[Stage]) -> None:
        self.stages, self.replicas = stages, list[Replicas]()

    def get_world_size(self) -> int:
        return len(self.stages)

    def all_gather_object(self, everyone: list[Any], own: Any) -> None:
        if isinstance(own, int):
            rows = list(self.replicas[0].rows.values())
            hashes = [one._hashes(CPU)[rows] for one in self.replicas]
            wrong = [row for row in rows if len({int(own[row]) for own in hashes}) > 1]
            everyone[:] = [int(own[min(wrong)]) for own in hashes]
        else:
            everyone[:] = [own] * len(everyone)

    def all_reduce(self, both: torch.Tensor, op: Any) -> None:
        assert op == self.ReduceOp.MAX
        own = torch.stack([one._hashes(CPU) for one in self.replicas])
        both.copy_(torch.stack([own.amax(0), (-own).amax(0)]))


@pytest.fixture
def differ(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[ReplicaDifference | None]]:
    """What each of four ranks finds after the weights of some have changed."""

    def found(
        *changed: tuple[int, Callable[[torch.Tensor], Any]],
    ) -> list[ReplicaDifference | None]:
        stages = [Stage(read_spec(MODELS["llama"]), Grid()).initialise(1) for _ in range(4)]
        ranks = Ranks(stages)
        monkeypatch.setattr(replicas, "dist", ranks)
        ranks.replicas = [Replicas(stage) for stage in stages]
        for rank, change in changed:
            with torch.no_grad():
                change(next(x for x, place in placed(stages[rank]) if place.name == NAME))
        return [one.difference(CPU) for one in ranks.replicas]

    return found


def bit_flipped(value: torch.Tensor) -> None:
    value.view(torch.int32)[3, 5] ^= 1


def doubled(value: torch.Tensor) -> None:
    value *= 2


def test_equal_copies_are_equal(differ: Callable[..., list[ReplicaDifference | None]]) -> None:
    assert differ() == [None] * 4


def test_a_flipped_bit_is_found_on_its_rank(
    differ: Callable[..., list[ReplicaDifference | None]],
) -> None:
    assert differ((2, bit_flipped)) == [ReplicaDifference(NAME, (2,), divided=False)] * 4
    assert differ((0, doubled), (3, bit_flipped)) == [ReplicaDifference(NAME, (0, 3), False)] * 4


def test_two_against_two_are_all_named(
    differ: Callable[..., list[ReplicaDifference | None]],
) -> None:
    assert differ((1, doubled), (3, doubled)) == [ReplicaDifference(NAME, (0, 1, 2, 3), True)] * 4


def test_the_line_names_tensor_ranks_and_hosts() -> None:
    hosts = ["a", "a", "b", "b"]
    assert ReplicaDifference("x", (3,), False).line(hosts) == (
        "x: rank 3 on b holds another value: copies of a weight must be bitwise equal"
    )
    assert (
        ReplicaDifference("x", (1, 2), True)
        .line(hosts)
        .startswith(
            "x: rank 1 on a, rank 2 on b hold different values, and no majority says which is right"
        )
    )
