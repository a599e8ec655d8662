"""Losses and gradients that are not finite, spikes, diverged copies, stragglers: detected in the same step, reported,
and handled as the config says, identically on every rank."""

import contextlib
import functools
import json
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megalite.checkpoint import storage
from megalite.checkpoint.boxes import Box
from megalite.checkpoint.files import Checkpoint, checkpoints_of, find_checkpoint
from megalite.config.limits import Faults
from megalite.data.loader import TrainData
from megalite.data.position import Position
from megalite.engine.engine import Engine
from megalite.errors import DataError
from megalite.guard.health import Health
from megalite.guard.pace import Pace
from megalite.model.transformer import Stage
from megalite.pipeline.actions import Pipeline
from megalite.training.batches import LazyMicroBatches, MicroBatch
from megalite.training.evaluation import Validation
from megalite.training.metrics import FIRST_START
from tests.ranks import RankFailure, run_ranks
from tests.training_runs import BATCH, document, nothing, rows, spoilt, train

GRID = {"pipe": 2, "zero": 2}  # on 4 ranks: ranks 2 and 3 hold the last stage
LONG, LONG_TENSOR = (
    pytest.param(lay, 2, marks=pytest.mark.long) for lay in ({"zero": 3}, {"tensor": 2, "zero": 2})
)
KINDS = ("weight", "exp_avg", "exp_avg_sq")
SAME = ("step", "loss", "grad_norm", "skipped_steps", "consumed_samples")


def same(run_dir: Path, other: Path) -> None:
    for a, b in zip(rows(run_dir), rows(other), strict=True):
        assert [a[key] for key in SAME] == [b[key] for key in SAME]
    one, two = (Checkpoint.open(find_checkpoint(run)) for run in (run_dir, other))
    assert all(one.read(name).equal(two.read(name)) for name in one.names)


PLACES = [
    (
        3,
        "forward",
        "loss is nan; first in the loss of micro-batch 1 on rank 3 on HOST (pipe 1, data 1, tensor 0)",
    ),
    (
        0,
        "forward",
        "loss is nan; first in forward of micro-batch 1 on rank 0 on HOST (pipe 0, data 0, tensor 0)",
    ),
    (
        1,
        "backward",
        "gradient norm is nan; first in backward of micro-batch 1 on rank 1 on HOST (pipe 0, data 1",
    ),
    (
        2,
        "backward",
        "gradient norm is nan; first in backward of micro-batch 1 on rank 2 on HOST (pipe 1, data 0",
    ),
]
PLACES_OF_V = [  # the loss is on the first ranks
    (
        3,
        "forward",
        "loss is nan; first in forward of micro-batch 1 on rank 3 on HOST (pipe 1, data 1, tensor 0)",
    ),
    (
        1,
        "forward",
        "loss is nan; first in forward of micro-batch 1 on rank 1 on HOST (pipe 0, data 1, tensor 0)",
    ),
    (
        2,
        "backward",
        "gradient norm is nan; first in backward of micro-batch 1 on rank 2 on HOST (pipe 1, data 0",
    ),
]


@pytest.mark.parametrize(
    "schedule, places",
    [("1f1b", PLACES), ("zb-h1", PLACES[::2]), ("interleaved", PLACES[1:3]), ("zb-v", PLACES_OF_V)],
)
def test_the_first_place_that_was_not_finite_is_named_and_nothing_is_saved(
    tmp_path: Path, schedule: str, places: list[tuple[int, str, str]]
) -> None:
    def of(run: str) -> dict[str, Any]:
        made = document(tmp_path, run, {**GRID, "schedule": schedule})
        made["megalite"]["model"]["num_hidden_layers"] = 4
        return made

    runs: list[Any] = [
        (of(str(number)), functools.partial(spoilt, on=rank, at={2}, factor=math.nan, phase=phase))
        for number, (rank, phase, _) in enumerate(places)
    ]
    results = run_ranks(4, train, runs)
    assert all(result == results[0] for result in results)
    host = socket.gethostname()
    for number, (said, (_, _, wanted)) in enumerate(zip(results[0], places, strict=True)):
        assert f"step 2: {wanted.replace('HOST', host)}" in said and "gradients of " in said, said
        assert (
            len(rows(tmp_path / str(number))) == 1 and checkpoints_of(tmp_path / str(number)) == []
        )


@contextlib.contextmanager
def left_out_from_the_start(rank: int, ranges: tuple[tuple[int, int], ...]) -> Iterator[None]:
    """Excludes these samples from the corpus order from the start."""
    place = Position.place
    with mock.patch.object(
        Position, "place", lambda self, sample: place(Position(left_out=ranges), sample)
    ):
        yield


@pytest.mark.parametrize("layout, world", [(GRID, 4), ({"zero": 0}, 2), LONG, LONG_TENSOR])
def test_a_skipped_step_leaves_no_trace_but_its_row(
    tmp_path: Path, layout: dict[str, int], world: int
) -> None:
    """Weights and moments are bitwise equal to those of a run without that batch, also after a restart."""

    def of(run: str, steps: int) -> dict[str, Any]:
        return document(
            tmp_path, run, layout, train={"steps": steps, "faults": {"not_finite": "skip"}}
        )

    plant = functools.partial(spoilt, on=world - 1, at={3}, factor=math.nan)
    without = functools.partial(left_out_from_the_start, ranges=((2 * BATCH, 3 * BATCH),))
    runs: list[Any] = [
        (of("a", 6), plant),
        (of("b", 3), plant),
        (of("b", 6), nothing),
        (of("c", 5), without),
    ]
    assert run_ranks(world, train, runs) == [[0] * 4] * world
    made = rows(tmp_path / "a")
    assert [row.get("skipped") for row in made] == [None, None, "not_finite", None, None, None]
    assert [row["skipped_steps"] for row in made] == [0, 0, 1, 1, 1, 1]
    assert made[2]["grad_norm"] is None and made[2]["consumed_samples"] == 3 * BATCH
    same(tmp_path / "a", tmp_path / "b")
    one, two = (Checkpoint.open(find_checkpoint(tmp_path / run)) for run in "ac")
    for name in one.names:
        assert all(one.read(name, kind=kind).equal(two.read(name, kind=kind)) for kind in KINDS), (
            name
        )


@contextlib.contextmanager
def bad_samples(rank: int, numbers: set[int]) -> Iterator[None]:
    """A batch with one of these samples of the corpus order gives a loss that is not finite, wherever it is read."""
    forward = Stage.forward

    class Marked(LazyMicroBatches):
        def __init__(self, samples: Any, *args: Any, **named: Any) -> None:
            super().__init__(samples, *args, **named)
            self.samples = samples

        def __getitem__(self, number: int, /) -> MicroBatch:
            batch = super().__getitem__(number)
            if batch.context.randomness is not None:  # None: of an evaluation
                drawn = batch.context.randomness.samples.tolist()
                own = {self.samples._position.place(sample) for sample in drawn}
                batch.context.shared["bad"] = bool(own & numbers)
            return batch

    def spoil(
        self: Stage, x: Any, labels: Any = None, context: Any = None, chunk: Any = None
    ) -> Any:
        output = forward(self, x, labels, context, chunk)
        return output * math.nan if labels is not None and context.shared.get("bad") else output

    with (
        mock.patch("megalite.training.batches.LazyMicroBatches", Marked),
        mock.patch.object(Stage, "forward", spoil),
    ):
        yield


@pytest.mark.parametrize("layout, world", [(GRID, 4), LONG, ({"zero": 0}, 1)])
def test_a_run_goes_back_and_leaves_the_batch_out_for_good(
    tmp_path: Path, layout: dict[str, int], world: int
) -> None:
    """Samples 33 and 50 spoil steps 5 and 6; the checkpoint before is of step 4. In the end the run equals one whose
    corpus never had those batches, also after a restart, and each step has one row."""
    extra = {
        "checkpoint_interval": 2,
        "eval_interval": 2,
        "steps": 8,
        "faults": {"not_finite": "rewind"},
    }

    def of(run: str, steps: int = 8, **keys: Any) -> dict[str, Any]:
        made = document(tmp_path, run, layout, train={**extra, "steps": steps}, **keys)
        made["megalite"]["data"]["valid"] = made["megalite"]["data"]["train"]
        return made

    plant = functools.partial(bad_samples, numbers={33, 50})
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}
    runs: list[Any] = [
        (of("a", **scheduler), plant),
        (of("b", 5, **scheduler), plant),
        (of("b", **scheduler), plant),
    ]
    runs.append(
        (
            of("c", **scheduler),
            functools.partial(left_out_from_the_start, ranges=((32, 40), (48, 56))),
        )
    )
    assert run_ranks(world, train, runs) == [[0] * 4] * world
    a, b, c = (tmp_path / run for run in "abc")
    state = Checkpoint.open(find_checkpoint(a)).state
    assert state["left_out"] == [[32, 40], [48, 56]]
    read_by = {"samples": "windows", "loss": None, "reset_attention": False, "eod_mask_loss": False}
    assert state["data"] == read_by | {"objective": "causal"}
    all_rows = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in all_rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in all_rows if "valid_loss" in row] == [2, 4, 6, 8]
    same(a, c)
    same(b, c)
    faults = [json.loads(line) for line in (a / "faults.jsonl").read_text().splitlines()]
    assert [(fault["step"], fault["action"]) for fault in faults] == [(5, "rewind"), (6, "rewind")]


def test_a_run_stops_after_most_in_a_row(tmp_path: Path) -> None:
    plant = functools.partial(spoilt, on=0, at=set(range(2, 9)), factor=math.nan)
    actions = ("skip", "rewind")
    faults = [{"not_finite": action, "most_in_a_row": 2} for action in actions]
    runs = [(document(tmp_path, f["not_finite"], {}, train={"faults": f}), plant) for f in faults]
    for action, said in zip(actions, run_ranks(1, train, runs)[0], strict=True):
        assert "2 in a row before it (megalite.train.faults.most_in_a_row)" in said
        assert len((tmp_path / action / "faults.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_restart_does_not_forget_how_many_faults_there_were_in_a_row(
    tmp_path: Path, action: str
) -> None:
    """Two faults in each start: each start alone would tolerate that."""
    faults = {"not_finite": action, "most_in_a_row": 3}

    def of(steps: int) -> dict[str, Any]:
        keys = {"steps": steps, "checkpoint_interval": 1, "faults": faults}
        return document(tmp_path, "run", {}, train=keys)

    bad = functools.partial(spoilt, on=0, factor=math.nan)
    if action == "skip":  # steps 2 and 3, then 4 and 5
        runs = [
            (of(3), functools.partial(bad, at={2, 3})),
            (of(6), functools.partial(bad, at={1, 2})),
        ]
    else:  # step 2 rewinds twice and ends the start; then it rewinds once more, and may not again
        runs = [
            (of(6), functools.partial(bad, at={2, 3, 4})),
            (of(6), functools.partial(bad, at={1, 2})),
        ]
        runs[0][0]["megalite"]["train"]["faults"] = {**faults, "most_in_a_row": 2}
    first, second = run_ranks(1, train, runs)[0]
    assert first == 0 if action == "skip" else "2 in a row before it" in str(first)
    assert "3 in a row before it (megalite.train.faults.most_in_a_row)" in str(second), second


def soundness(rank: int, world_size: int) -> list[tuple[int, str]]:
    """(number of object collectives, message) of checks with a NaN on no rank, and on ranks 1 and 2."""
    calls = Counter[str]()

    def counting(name: str) -> Any:
        own = getattr(torch.distributed, name)

        def call(*args: Any, **named: Any) -> Any:
            calls["objects"] += 1
            return own(*args, **named)

        return mock.patch.object(torch.distributed, name, call)

    health: Any = SimpleNamespace(
        engine=SimpleNamespace(grid=SimpleNamespace(rank=rank, world_size=world_size)),
        faults=Faults.model_validate({}),
        _rank=lambda number: f"rank {number}",
        _answer=lambda step, fault: fault.text,
    )
    found = []
    with counting("all_gather_object"), counting("broadcast_object_list"):
        for bad in ((), (1, 2)):
            values = torch.tensor([1.0, math.nan if rank in bad else 2.0])
            boxes = {f"weight/of_{rank}": [Box((2,), (0,), values, (2,), 0)]}
            found.append((calls["objects"], Health.check_sound(health, boxes, 4) or "sound"))
    return found


def test_no_object_travels_while_checkpoints_are_sound() -> None:
    """With thousands of ranks, each would unpickle all others' objects."""
    found = run_ranks(3, soundness)
    line = "weight/of_1 is not finite on rank 1: must not be saved"
    assert found == [[(0, "sound"), (0, line)]] * 3


def fails_while_saving(rank: int, world_size: int, keys: dict[str, Any]) -> str:
    """Rank 1 reads an invalid token at step 3, while the checkpoint of step 2 is written, and returns what it then
    finds; the others wait for it."""
    whole, write = TrainData.batch, storage.write_tensors
    bad = range(2 * BATCH, 3 * BATCH)

    def batch(self: TrainData, positions: Any) -> Any:
        if rank == 1 and set(positions) & set(bad):
            raise DataError("a token is beyond the vocabulary")
        return whole(self, positions)

    def slow(*args: Any) -> str:
        time.sleep(1.5)
        return write(*args)

    with (
        mock.patch.object(TrainData, "batch", batch),
        mock.patch.object(storage, "write_tensors", slow),
    ):
        try:
            return str(train(rank, world_size, [(keys, nothing)]))
        except DataError as error:
            saved = [
                path.name for path in checkpoints_of(Path(keys["megalite"]["train"]["run_dir"]))
            ]
            print(f"{error}: {saved}", flush=True)
            raise


def test_a_token_that_one_rank_refuses_does_not_cost_a_checkpoint(tmp_path: Path) -> None:
    keys = document(tmp_path, "run", {}, train={"checkpoint_interval": 2})
    with pytest.raises(RankFailure, match=r"beyond the vocabulary: \['step_00000002'\]"):
        run_ranks(2, fails_while_saving, keys)


@contextlib.contextmanager
def weights_spoilt(rank: int, at: int) -> Iterator[None]:
    """After the update of step `at` a master weight on the last rank is NaN."""
    step = Pipeline.train_step
    calls = 0

    def spoil(self: Pipeline, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(self, *args)
        if calls == at and rank == 1:
            next(iter(self.engine.shards())).master[3] = math.nan
        return result

    with mock.patch.object(Pipeline, "train_step", spoil):
        yield


def test_no_checkpoint_ever_holds_a_nan(tmp_path: Path) -> None:
    every = {"checkpoint_interval": 2}
    stop = document(tmp_path, "stop", {}, train=every)
    back = document(tmp_path, "back", {}, train={**every, "faults": {"not_finite": "rewind"}})
    plant = functools.partial(weights_spoilt, at=4)
    said, code = run_ranks(2, train, [(stop, plant), (back, plant)])[0]
    assert str(said).startswith("step 4: weight/") and "is not finite on rank 1 on " in str(said)
    assert [path.name for path in checkpoints_of(tmp_path / "stop")] == ["step_00000002"]
    assert code == 0 and [row["step"] for row in rows(tmp_path / "back")] == [1, 2, 3, 4, 5, 6]
    for path in checkpoints_of(tmp_path / "back"):
        held = Checkpoint.open(path)
        kinds = KINDS if held.has_moments else KINDS[:1]
        assert all(
            held.read(name, kind=kind).isfinite().all() for name in held.names for kind in kinds
        )


def test_a_spike_is_told_of_or_goes_back(tmp_path: Path) -> None:
    plant = functools.partial(spoilt, on=0, at={2, 5}, factor=9.0, phase="forward")
    actions = ("warn", "rewind")
    faults = [{"spike": action, "spike_factor": 2.0, "spike_window": 3} for action in actions]
    keys = [{"faults": each, "checkpoint_interval": 2} for each in faults]
    runs = [
        (document(tmp_path, action, {}, train=key), plant)
        for action, key in zip(actions, keys, strict=True)
    ]
    assert run_ranks(1, train, runs) == [[0, 0]]
    for action in actions:
        fault = json.loads((tmp_path / action / "faults.jsonl").read_text())
        assert (fault["step"], fault["kind"], fault["action"]) == (5, "spike", action)
        assert "times the median" in fault["text"]
        assert ["skipped" in row for row in rows(tmp_path / action)] == [False] * 6


@contextlib.contextmanager
def evaluating_to(rank: int, loss: float) -> Iterator[None]:
    """Every evaluation returns this loss."""
    with mock.patch.object(
        Validation, "scores", lambda *args: torch.tensor([10 * loss, 10], dtype=torch.float64)
    ):
        yield


def test_a_validation_loss_beyond_what_exp_can_take_does_not_end_the_run(tmp_path: Path) -> None:
    run = document(tmp_path, "run", {}, train={"steps": 2, "eval_interval": 1})
    run["megalite"]["data"]["valid"] = run["megalite"]["data"]["train"]
    assert run_ranks(1, train, [(run, functools.partial(evaluating_to, loss=800.0))]) == [[0]]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "valid_loss" in row]
    assert found == [
        {"step": n, "valid_loss": 800.0, "valid_perplexity": sys.float_info.max} for n in (1, 2)
    ]


@contextlib.contextmanager
def flipped(rank: int, on: int, name: str) -> Iterator[None]:
    """After step 4 one bit of a weight on rank `on` is flipped."""
    bytes_of = Pipeline.train_step
    calls = 0

    def flip(self: Pipeline, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = bytes_of(self, *args)
        if rank == on and calls == 4:
            value = next(v for v in self.engine.module.parameters() if v.placement.name == name)
            value.data.view(-1)[-1:].view(torch.uint8)[0] ^= 1
        return result

    with mock.patch.object(Pipeline, "train_step", flip):
        yield


@pytest.mark.parametrize(
    "layout, world, name, on, said",
    [
        (
            {"tensor": 2, "zero": 1},
            4,
            "layers.1.mlp_norm.weight",
            2,
            "rank 2 on HOST holds another value",
        ),
        (
            {"pipe": 2, "zero": 1},
            2,
            "embedding.tokens.weight",
            1,
            "rank 0 on HOST, rank 1 on HOST hold different",
        ),
        pytest.param(
            {"zero": 2},
            3,
            "layers.0.attention.query.weight",
            1,
            "rank 1 on HOST holds another",
            marks=pytest.mark.long,
        ),
    ],
)
def test_one_flipped_bit_is_found(
    tmp_path: Path, layout: dict[str, int], world: int, name: str, on: int, said: str
) -> None:
    run = document(tmp_path, "run", layout, train={"faults": {"replica_check_interval": 2}})
    sound = document(tmp_path, "sound", layout, train={"faults": {"replica_check_interval": 1}})
    for keys in (run, sound):
        if world == 3:
            keys |= {"train_batch_size": 12}
        keys["bf16"] = {"enabled": world == 2}
    results = run_ranks(
        world, train, [(run, functools.partial(flipped, on=on, name=name)), (sound, nothing)]
    )
    host = socket.gethostname()
    for line, code in results:
        assert code == 0 and str(line).startswith(
            f"step 4: {name}: {said.replace('HOST', host)}"
        ), line


@contextlib.contextmanager
def slowed(rank: int, on: int) -> Iterator[None]:
    """On rank `on` each forward takes 100 ms longer."""
    forward = Engine.forward

    def slow(self: Engine, *args: Any, **kwargs: Any) -> Any:
        if rank == on:
            time.sleep(0.1)
        return forward(self, *args, **kwargs)

    with mock.patch.object(Engine, "forward", slow):
        yield


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, pytest.param({"zero": 3}, marks=pytest.mark.long)]
)
def test_a_slow_rank_s_own_time_is_told_from_that_of_ranks_that_wait_for_it(
    tmp_path: Path, layout: dict[str, int]
) -> None:
    """A busy machine may slow down the other rank too, for a step or two."""
    run = document(tmp_path, "run", layout, train={"steps": 5, "faults": {"pace_interval": 1}})
    run_ranks(2, train, [(run, functools.partial(slowed, on=1))])
    assert (
        sum(
            row["slowest_rank"] == 1 and row["forward_seconds"] > 0.2
            for row in rows(tmp_path / "run")
        )
        >= 3
    )


def test_a_rank_is_named_that_is_slow_for_its_stage_s_work_time_after_time() -> None:
    pace = Pace.__new__(Pace)
    pace.faults, pace.hosts, pace.slow = (
        Faults.model_validate({"slow_looks": 2}),
        ["a", "a", "b", "b"],
        {},
    )
    work = [2.0, 2.0, 4.0, 4.0]  # the last stage has twice the work
    assert pace.judge(10, [1.0, 1.1, 2.1, 3.3], work)[1] == []
    assert pace.judge(20, [1.0, 1.0, 2.0, 2.0], work)[1] == []
    assert pace.judge(30, [1.0, 1.9, 2.0, 3.2], work)[1] == []
    row, lines = pace.judge(40, [1.0, 1.0, 2.0, 4.0], work)
    assert row == {"forward_seconds": 4.0, "slowest_rank": 3, "slowest_ratio": 2.0}
    assert lines == [
        "rank 3 on b is slow: own time in forward at step 30: 3.2 s, 1.60 times the median; "
        "step 40: 4 s, 2.00 times the median"
    ]
    assert pace.judge(50, [1.0, 1.0, 2.0, 4.0], work)[1] == []  # reported once


def test_goodput_counts_all_time_and_only_steps_that_stand(tmp_path: Path) -> None:
    plant = functools.partial(spoilt, on=0, at={2}, factor=math.nan)
    faults = {"faults": {"not_finite": "skip"}}
    run_ranks(1, train, [(document(tmp_path, "run", {}, train={"steps": 3, **faults}), plant)])
    first = json.loads((tmp_path / "run" / FIRST_START).read_text())["unix_seconds"]
    run_ranks(1, train, [(document(tmp_path, "run", {}, train={"steps": 5, **faults}), nothing)])
    made = rows(tmp_path / "run")
    useful = sum(row["step_seconds"] for row in made if "skipped" not in row)
    assert json.loads((tmp_path / "run" / FIRST_START).read_text())["unix_seconds"] == first
    until = useful / made[-1]["goodput"]  # seconds since the first start
    assert sum(row["step_seconds"] for row in made) < until < time.time() - first
    assert run_ranks(
        1, train, [(document(tmp_path, "run", {}, train={"steps": 5, **faults}), nothing)]
    ) == [[0]]
    assert rows(tmp_path / "run") == made  # there already


def test_left_out_samples_are_passed_over_in_the_corpus_order() -> None:
    position = Position()
    order = list(range(100))
    for batch in (range(8, 16), range(4, 12), range(30, 33)):
        taken = [position.place(number) for number in batch]
        position = position.leaving_out(batch)
        order = [place for place in order if place not in taken]
        assert [position.place(number) for number in range(40)] == order[:40]
    assert (
        Position.from_state(
            {"step": 3, "consumed_samples": 24, "consumed_tokens": 9, "x": 1}
        ).updates
        == 3
    )
