"""Initial weights (engine/initial.py): the same on every layout, drawn once over a data axis, and never whole on a rank
of ZeRO-3."""

import contextlib
import copy
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

from megalite.config import Config
from megalite.engine import initial
from megalite.engine.build import build_engine
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Placement, initial_slice, placed
from megalite.ranks.garbage import hold_garbage
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, rows, train

ODD = {"hidden_size": 40, "intermediate_size": 53, "vocab_size": 131}


def odd_document(folder: Path, layout: dict[str, int], dtype: str) -> dict[str, Any]:
    keys = document(folder, "run", layout)
    keys["megalite"]["model"] |= ODD
    if dtype == "bf16":
        keys["bf16"] = {"enabled": True}
    return keys


def masters(
    rank: int, world_size: int, documents: list[dict[str, Any]]
) -> list[tuple[list[tuple[Placement, int, torch.Tensor]], list[str]]]:
    """For each config: this rank's masters, and the parameters that it has drawn."""
    deepspeed.init_distributed("gloo")
    results = []
    for keys in documents:
        config = Config.from_dict(copy.deepcopy(keys)).resolve(world_size)
        names: list[str] = []

        def counted(place: Placement, seed: int, names: list[str] = names) -> torch.Tensor:
            names.append(place.name)
            return initial_slice(place, seed)

        with mock.patch.object(initial, "initial_slice", counted):
            grid = Grid.build(config.parallel.pipe, config.parallel.tensor)
            engine = build_engine(config, read_spec(config.model), grid)
        held = [(s.placement, s.start, s.master.clone()) for s in engine.shards()]
        results.append((held, names))
    return results


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_layout_starts_from_the_weights_of_one_process(tmp_path: Path, dtype: str) -> None:
    layouts = [{"zero": 1}, {"zero": 3}]
    if dtype == "fp32":
        layouts = [{"zero": 0, "tensor": 2}, {"zero": 2, "pipe": 2}, {"zero": 3, "tensor": 2}]
        layouts.append({"zero": 1, "tensor": 4})
    documents = [odd_document(tmp_path, layout, dtype) for layout in layouts]
    config = Config.from_dict(documents[0]).resolve(4)
    stage = Stage(read_spec(config.model), Grid()).initialise(config.train.seed)
    one = {place.name: value.detach() for value, place in placed(stage)}
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    for layout, of_ranks in zip(
        layouts, zip(*run_ranks(4, masters, documents), strict=True), strict=True
    ):
        seen: dict[str, int] = dict.fromkeys(one, 0)
        for held, _ in of_ranks:
            for place, start, master in held:
                wanted = place.cut(one[place.name]).reshape(-1)[start : start + len(master)]
                assert torch.equal(master, wanted.to(kind).float()), (layout, place.name)
                seen[place.name] += len(master)
        assert all(seen.values())
        # A stage's parameters are drawn once over the data and tensor axes, not by each of its ranks.
        random = [place.name for _, place in placed(stage) if place.std is not None]
        tied_copies = layout.get("pipe", 1) - 1
        counts = [len(names) for _, names in of_ranks]
        assert sum(counts) == len(random) + tied_copies
        assert max(counts) <= sum(counts) / len(counts) + 1, "ranks share the work"


def undrawn(rank: int, world_size: int, keys: dict[str, Any]) -> list[float]:
    deepspeed.init_distributed("gloo")
    config = Config.from_dict(keys).resolve(world_size)
    with mock.patch.object(initial, "initial_slice", side_effect=AssertionError("drawn")):
        grid = Grid.build(1, 1)
        engine = build_engine(config, read_spec(config.model), grid, draws_weights=False)
    return [float(shard.master.abs().sum()) for shard in engine.shards() if shard.placement.std]


@pytest.mark.parametrize("zero", [1, 3])
def test_nothing_is_drawn_where_weights_come_from_elsewhere(tmp_path: Path, zero: int) -> None:
    for sums in run_ranks(2, undrawn, odd_document(tmp_path, {"zero": zero}, "fp32")):
        assert not any(sums)


@contextlib.contextmanager
def without_drawing(rank: int) -> Iterator[None]:
    with mock.patch.object(initial, "initial_slice", side_effect=AssertionError("drawn")):
        yield


@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_that_resumes_or_loads_weights_draws_nothing(tmp_path: Path, zero: int) -> None:
    def of(run: str, **keys: Any) -> dict[str, Any]:
        return document(tmp_path, run, {"zero": zero}, train=keys)

    runs = [
        (of("a", steps=1), nothing), (of("a", steps=2), without_drawing),
        (of("b", steps=1, load=str(tmp_path / "a")), without_drawing),
    ]  # fmt: skip
    assert run_ranks(2, train, runs) == [[0, 0, 0]] * 2
    assert [row["step"] for row in rows(tmp_path / "a")] == [1, 2]


def peak_of_a_start(rank: int, world_size: int, keys: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of the whole slices, and how much memory the rank has gained when the engine is built, and at the peak on
    the way."""
    hold_garbage()  # as a run does
    deepspeed.init_distributed("gloo")
    config = Config.from_dict(keys).resolve(world_size)
    spec, grid = read_spec(config.model), Grid.build(1, 1)
    build_engine(Config.from_dict(small(keys)).resolve(world_size), spec_of(small(keys)), grid)
    # Each large tensor has its own pages: otherwise freed memory stays with the process, fragmented.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_bytes("VmRSS")
    engine = build_engine(config, spec, grid)
    whole = sum(
        4 * place.cut(torch.empty(place.full_shape, device="meta")).numel()
        for _, place in placed(engine.stage)
    )
    return whole, status_bytes("VmRSS") - before, status_bytes("VmHWM") - before


M_MMAP_THRESHOLD = -3  # malloc.h


def small(keys: dict[str, Any]) -> dict[str, Any]:
    """A model of the same kind that is built first, so that one-time loading is not counted."""
    other = copy.deepcopy(keys)
    other["megalite"]["model"] |= {"hidden_size": 32, "intermediate_size": 52, "vocab_size": 131}
    return other


def spec_of(keys: dict[str, Any]) -> Any:
    return read_spec(Config.from_dict(keys).model)


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def test_zero_3_never_holds_the_model(tmp_path: Path) -> None:
    """109 MB of fp32 weights over 4 ranks: weights, masters and the buffer of gradients are each a quarter. The limit
    leaves room for one layer besides, drawn, sent and gathered parameter by parameter, but not for the model."""
    keys = document(tmp_path, "run", {"zero": 3})
    keys["zero_optimization"] |= {"reduce_bucket_size": 100_000}
    width, inner = 512, 1376
    keys["megalite"]["model"] |= {
        "hidden_size": width, "intermediate_size": inner, "vocab_size": 2000, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    layer = 4 * (4 * width**2 + 3 * width * inner)
    for whole, after, peak in run_ranks(4, peak_of_a_start, keys):
        print(f"whole {whole / 1e6:.1f} MB, held {after / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB")
        assert whole > 100e6
        assert after < 0.75 * whole + SLACK
        assert peak < 0.75 * whole + layer + SLACK


SLACK = 4e6  # bytes of everything other than weights
