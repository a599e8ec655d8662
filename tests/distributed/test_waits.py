"""How often the host reads a tensor's value in a step: on a GPU each read waits until the device has finished its
queue. And that batches are prefetched by one step."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.checkpoint.boxes import Box
from megalite.data.position import Position
from megalite.engine.norm import GlobalNorm
from megalite.guard.health import not_finite
from megalite.model.context import Context
from megalite.parallel import loss
from megalite.pipeline.interpreter import Interpreter
from megalite.training.batches import MicroBatch, Prefetcher
from megalite.training.loop import Run
from tests.classifiers import LABELS, labelled_corpus
from tests.ranks import run_ranks
from tests.small_models import MODELS
from tests.streams import like_a_gpu
from tests.training_runs import document, train

MOST_READS = (
    3  # one is of the device; the others, one less with ZeRO-0, are of values in main memory
)
READS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.equal",
}
MADE = "aten.lift_fresh"  # by torch.tensor: on a GPU a copy for which the host waits
STEPS = 4


WIDE = "a tensor in fp64"


class Reads(TorchDispatchMode):
    """Counts operations that need a tensor's values on the host, by name, and in `made` new tensors that a step does
    not need."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        by_mask = name in ("aten.index", "aten.index_put_") and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        if name in READS or by_mask:
            self.found[name] += 1
        if name == MADE:
            self.made[name] += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64 and result.numel() > 1:
            self.made[WIDE] += 1
        return result


@contextlib.contextmanager
def counted(
    steps: list[Counter[str]], in_actions: list[Counter[str]], zero: dict[str, Any]
) -> Iterator[None]:
    """Counts the reads of each optimizer step, and the reads and new tensors of its forwards and backwards alone.
    DeepSpeed behaves as on a GPU, whose streams must be joined when the gradients are read; if it offloads them, the
    host must have waited for them. zero: the run's keys of ZeRO."""
    whole, actions, norm = Run._step, Interpreter.run, GlobalNorm.__call__
    reads: list[Reads] = []

    def step(self: Run) -> Any:
        with Reads() as found:
            reads.append(found)
            streams.host_waits = found.found
            result = whole(self)
        steps.append(Counter(found.found))  # without what saving reads afterwards
        return result

    def run(self: Interpreter, *args: Any) -> None:
        before = reads[-1].found + reads[-1].made
        actions(self, *args)
        in_actions.append(reads[-1].found + reads[-1].made - before)

    def joined(self: GlobalNorm, *args: Any, **kwargs: Any) -> Any:
        assert not streams.not_joined
        assert streams.host_waits["event"] == ("offload_optimizer" in zero)
        return norm(self, *args, **kwargs)

    def told(kind: type, name: str) -> Any:
        original = getattr(kind, name)

        def read(self: Any, *args: Any) -> Any:
            if reads:
                reads[-1].found[name] += 1
            return original(self, *args)

        return mock.patch.object(kind, name, read)

    to = Tensor.to

    def moved(self: Tensor, *args: Any, **keys: Any) -> Tensor:
        from_host = "offload_param" in zero and hasattr(self, "final_location")  # a shard
        if from_host and reads and not keys.get("non_blocking"):
            reads[-1].found["to"] += 1
        return to(self, *args, **keys)

    with like_a_gpu() as streams, contextlib.ExitStack() as patches:
        for patch in (
            mock.patch.object(Run, "_step", step), mock.patch.object(Interpreter, "run", run),
            # As on every device but a CPU.
            mock.patch.object(loss, "_rows_that_count", lambda labels: None),
            mock.patch.object(GlobalNorm, "__call__", joined), mock.patch.object(Tensor, "to", moved),
            told(Tensor, "tolist"), told(Tensor, "numpy"), told(Tensor, "cpu"),
        ):  # fmt: skip
            patches.enter_context(patch)
        yield


def counts(
    rank: int, world_size: int, keys: dict[str, Any]
) -> tuple[list[Counter[str]], list[Counter[str]]]:
    steps: list[Counter[str]] = []
    in_actions: list[Counter[str]] = []
    with counted(steps, in_actions, keys["zero_optimization"]):
        assert train(rank, world_size, [(keys, lambda rank: contextlib.nullcontext())]) == [0]
    return steps, in_actions


MASKED = {"masked": 0.3, "mask_token_id": 4, "special_token_ids": [0, 1, 2, 3]}
PACKED = {"samples": "packed", "reset_attention": True, "loss": "all"}
EXPERTS = MODELS["mixtral"] | {"intermediate_size": 64, "num_hidden_layers": 2}  # rows of 16 bytes
WAYS: list[dict[str, Any]] = [
    {"layout": {"zero": 0}}, {"layout": {"zero": 1}}, {"layout": {"zero": 2}}, {"layout": {"zero": 3}},
    {"layout": {"zero": 1}, "zero": {"overlap_comm": True}}, {"layout": {"zero": 2}, "zero": {"overlap_comm": True}},
    {"layout": {"zero": 2}, "zero": {"overlap_comm": True, "contiguous_gradients": False}},
    {"layout": {"zero": 3}, "zero": {"overlap_comm": False}},
    {"layout": {"zero": 2, "tensor": 2}}, {"layout": {"zero": 1, "tensor": 2, "sequence": True}},
    {"layout": {"zero": 1, "context": 2}}, {"layout": {"zero": 2, "context": 2, "context_attention": "heads"}},
    {"layout": {"zero": 1, "pipe": 2}}, {"layout": {"zero": 1, "pipe": 2, "schedule": "interleaved"}},
    {"layout": {"zero": 1, "pipe": 2, "schedule": "zb-h1"}}, {"layout": {"zero": 2, "pipe": 2, "schedule": "zb-v"}},
    {"layout": {"zero": 1}, "model": MODELS["modernbert"], "data": {"objective": MASKED, **PACKED}},
    {"layout": {"zero": 1}, "model": MODELS["bert"], "data": {"objective": {"classes": list(LABELS)}, **PACKED}},
    {"layout": {"zero": 1}, "model": EXPERTS},
]  # fmt: skip


def keys_of(folder: Path, way: dict[str, Any]) -> dict[str, Any]:
    data = way.get("data", {})
    if "classes" in data.get("objective", {}):
        labelled_corpus(folder / "corpus", texts=100, mean=5)
    keys = document(folder, "run", way["layout"], train={"steps": STEPS, "checkpoint_interval": 0})
    keys["megalite"]["data"] |= data
    keys["zero_optimization"] |= way.get("zero", {})
    model = keys["megalite"]["model"] | {"num_hidden_layers": 4}
    keys["megalite"]["model"] = way.get("model", model)
    if way["layout"]["zero"]:
        keys["bf16"] = {"enabled": True}
    return keys


@pytest.mark.parametrize(
    "way",
    WAYS,
    ids=lambda way: (
        f"{way['layout']} {way.get('model', {}).get('model_type', '')} {way.get('zero', '')}"
    ),
)
def test_a_step_reads_the_device_once_and_a_micro_batch_never(
    tmp_path: Path, way: dict[str, Any]
) -> None:
    for steps, in_actions in run_ranks(2, counts, keys_of(tmp_path, way)):
        assert len(steps) == len(in_actions) == STEPS
        for step in steps[1:]:  # the first one's memory is measured
            most = MOST_READS - (way["layout"]["zero"] == 0)
            assert sum(step.values()) <= most, step
        # In the first one ZeRO-3 records the order of fetches.
        assert not any(in_actions[1:]), in_actions


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_with_offload_a_step_also_waits_for_the_gradients_copies(
    tmp_path: Path, zero: int, precision: str, overlaps: bool
) -> None:
    """Once for all of them, before the update; not for each gradient or micro-batch."""
    offload = {"offload_optimizer": {"device": "cpu"}, "overlap_comm": overlaps}
    way = {"layout": {"zero": zero}, "zero": offload}
    keys = keys_of(tmp_path, way) | {"bf16": {"enabled": precision == "bf16"}}
    for steps, in_actions in run_ranks(2, counts, keys):
        for step in steps[1:]:
            assert step["event"] == 1 and sum(step.values()) <= MOST_READS + 1, step
        assert not any(in_actions[1:]), in_actions


@pytest.mark.parametrize(
    "keys", [{}, {"stage3_param_persistence_threshold": 0}, {"stage3_allgather_sequential": True}]
)
@pytest.mark.parametrize("offload", [{}, {"offload_optimizer": {"device": "cpu"}}])
def test_with_offload_param_no_gather_waits(
    tmp_path: Path, offload: dict[str, Any], keys: dict[str, Any]
) -> None:
    way = {"layout": {"zero": 3}, "zero": {"offload_param": {"device": "cpu"}, **offload, **keys}}
    for steps, in_actions in run_ranks(2, counts, keys_of(tmp_path, way)):
        for step in steps[1:]:
            assert step["event"] == len(offload) and sum(step.values()) <= MOST_READS + 1, step
        assert not any(in_actions[1:]), in_actions


@pytest.mark.parametrize(("expert", "looped"), [(2, False), (2, True), (1, True)])
def test_experts_read_once_a_layer_and_micro_batch(
    tmp_path: Path, expert: int, looped: bool
) -> None:
    """The sizes of the expert axis's messages, or of a loop's parts, are known only after the router's choice."""
    model = EXPERTS | {"intermediate_size": 26 if looped else 64}
    keys = keys_of(tmp_path, {"layout": {"zero": 1, "expert": expert}, "model": model})
    layers, micro_batches = EXPERTS["num_hidden_layers"], 2
    for steps, in_actions in run_ranks(2, counts, keys):
        for step, actions in zip(steps[1:], in_actions[1:], strict=True):
            assert actions == {"tolist": layers * micro_batches}
            assert sum(step.values()) <= MOST_READS + layers * micro_batches, step


DEEPSPEEDS = {
    "device": ({"zero": 2}, "megalite.engine.zero.ShardedOptimizer._streams_in_order"),
    "stream": ({"zero": 3}, "megalite.engine.zero3.join_on_the_device"),
}


def counts_of_deepspeeds(
    rank: int, world_size: int, keys: dict[str, Any], name: str
) -> list[Counter[str]]:
    with mock.patch(name, lambda *args: contextlib.nullcontext()):
        return counts(rank, world_size, keys)[1]


@pytest.mark.parametrize("waits_for", DEEPSPEEDS)
def test_deepspeeds_own_waits_on_a_gpu_are_counted(tmp_path: Path, waits_for: str) -> None:
    layout, name = DEEPSPEEDS[waits_for]
    keys = keys_of(tmp_path, {"layout": layout, "zero": {"overlap_comm": True}})
    for in_actions in run_ranks(2, counts_of_deepspeeds, keys, name):
        assert all(actions[waits_for] > 0 for actions in in_actions), in_actions


def test_what_is_to_be_saved_is_judged_by_one_read() -> None:
    values = [torch.ones(3), torch.ones(2, 2), torch.tensor([0.0, torch.nan]), torch.ones(0)]
    values += [torch.tensor([-torch.inf]), torch.full((4,), 3e38)]
    boxes = {f"weight/{n}": [Box((9,), (0,), value)] for n, value in enumerate(values)}
    boxes["weight/0"] *= 2
    tolist, lists = Tensor.tolist, []

    def read(self: Tensor) -> Any:
        lists.append(self.shape)
        return tolist(self)

    with Reads() as reads, mock.patch.object(Tensor, "tolist", read):
        assert not_finite(boxes) == ["weight/2", "weight/4"]
    assert (reads.found, len(lists)) == ({}, 1)


def test_a_timer_that_waits_is_counted(tmp_path: Path) -> None:
    keys = document(tmp_path, "run", {"zero": 1}, train={"steps": STEPS, "checkpoint_interval": 0})
    keys["timers"] = {"throughput": {"enabled": True}}
    for _, in_actions in run_ranks(2, counts, keys):
        assert any(actions["device"] for actions in in_actions)


def test_the_counter_counts() -> None:
    values = torch.tensor([1.0, 0.0])
    with Reads() as reads:
        values[0].item(), bool(values[0]), int(values[0]), float(values[0])
        values[values > 0]
        values.nonzero()
        torch.tensor([1, 2]), torch.zeros(2), torch.arange(2)
    assert reads.found == {"aten._local_scalar_dense": 4, "aten.index": 1, "aten.nonzero": 1}
    assert reads.made == {MADE: 1}


def test_batches_are_those_of_the_position_however_the_run_moves() -> None:
    """Prefetched by one step if the run continues, read anew if it rewinds or skips samples."""
    asked: list[tuple[int, int]] = []

    def read(position: Position) -> list[MicroBatch]:
        asked.append((position.step, len(position.left_out)))
        tokens = torch.from_numpy(
            np.full((1, 2), position.consumed_samples + 1000 * len(position.left_out))
        )
        return [MicroBatch(tokens, tokens, Context())]

    ahead = Prefetcher(read, torch.device("cpu"))
    first = Position()
    second = first.after(4, 8)
    for position, following in ((first, second), (second, second.after(4, 8)), (first, second)):
        assert ahead.take(position, following)[0].tokens.unique().tolist() == [
            position.consumed_samples
        ]
    gone_back = first.leaving_out(range(2))
    assert ahead.take(gone_back, None)[0].tokens.unique().tolist() == [1000]
    ahead.close()
    assert asked == [(0, 0), (1, 0), (2, 0), (0, 0), (1, 0), (0, 1)]


def test_what_reading_ahead_raised_is_raised_at_its_step() -> None:
    def read(position: Position) -> list[MicroBatch]:
        if position.step == 1:
            raise ValueError("a token id that the vocabulary does not have")
        return []

    ahead, first = Prefetcher(read, torch.device("cpu")), Position()
    assert ahead.take(first, first.after(1, 1)) == []
    with pytest.raises(ValueError, match="a token id"):
        ahead.take(first.after(1, 1), None)
    ahead.close()
