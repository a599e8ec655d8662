"""Copies along the tensor axis remain equal if data groups add gradients in different orders (engine/tensor_copies.py).
On CPUs they add in one order, so the test changes the gradients."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

from megalite.config import Config
from megalite.engine import engine as engine_module
from megalite.engine.norm import GlobalNorm
from megalite.engine.tensor_copies import copies_of
from megalite.guard.replicas import Replicas
from megalite.prove.trace import Session
from tests.ranks import run_ranks
from tests.small_models import MODELS
from tests.training_runs import document

CPU, STEPS = torch.device("cpu"), 2
ODD = {"hidden_size": 40, "intermediate_size": 53, "vocab_size": 131}


@contextlib.contextmanager
def other_sums(tensor_rank: int, size: int) -> Iterator[None]:
    """Each rank of the tensor axis but the first has other gradients of tensors with copies: not only by a factor,
    which Adam would divide out."""
    whole = GlobalNorm.__call__

    def changed(self: GlobalNorm, pieces: Any, *args: Any, **more: Any) -> Any:
        pieces = list(pieces)
        for placement, gradient in pieces:
            if tensor_rank % copies_of(placement, size) > 0:
                gradient.neg_()
        return whole(self, pieces, *args, **more)

    with mock.patch.object(GlobalNorm, "__call__", changed):
        yield


def trained(
    rank: int, world_size: int, keys: dict[str, Any], ways: list[tuple[bool, bool]]
) -> list[tuple[str | None, list[torch.Tensor]]]:
    """For each way (gradients differ, copies take those of the first): the first tensor whose copies differ, and this
    rank's weights."""
    deepspeed.init_distributed("gloo")
    results = []
    for differ, take in ways:
        with mock.patch.object(engine_module, "may_differ", lambda device, take=take: take):
            session = Session.build(Config.from_dict(keys).resolve(world_size))
        axis = session.engine.grid.tensor
        with other_sums(axis.rank, axis.size) if differ else contextlib.nullcontext():
            for step in range(STEPS):
                session.step(step)
        found = Replicas(session.engine.stage).difference(CPU)
        weights = [shard.master.clone() for shard in session.engine.shards()]
        results.append((found and found.name, weights))
    return results


@pytest.mark.parametrize(
    "layout, changes",
    [
        ({"tensor": 2, "zero": 0}, {}), ({"tensor": 2, "zero": 1, "sequence": True}, {}),
        ({"tensor": 2, "zero": 2}, {"bf16": {"enabled": True}}), ({"tensor": 2, "zero": 3}, {}),
        ({"tensor": 4, "zero": 1}, {}),  # with 2 key/value heads: copies of them too
        ({"tensor": 2, "zero": 1}, {"model": MODELS["mixtral"]}),
        ({"tensor": 2, "zero": 2}, {"offload_optimizer": {"device": "cpu"}}),
    ],
)  # fmt: skip
def test_copies_remain_equal(
    tmp_path: Path, layout: dict[str, Any], changes: dict[str, Any]
) -> None:
    changes = dict(changes)
    keys = document(tmp_path, "run", layout)
    keys["megalite"]["model"] = changes.pop("model", keys["megalite"]["model"] | ODD)
    if "offload_optimizer" in changes:
        keys["zero_optimization"] |= changes
    else:
        keys |= changes
    ways = [(False, False), (True, True), (True, False)]
    for plain, taken, left in run_ranks(4, trained, keys, ways):
        assert plain[0] is None and taken[0] is None and left[0] is not None
        assert all(torch.equal(a, b) for a, b in zip(plain[1], taken[1], strict=True))
