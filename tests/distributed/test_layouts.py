"""Any layout, the same training: 8 steps (20 in the long form) compared with one process, and one process compared with
transformers and torch.

The bounds are those of tools/verify_layouts.py: 4 times the differences of one process between micro-batch sizes.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megalite.config import Config, Train
from megalite.data.loader import TrainData
from megalite.hub.names import to_hf
from megalite.model.families import read_spec
from megalite.model.parameter_groups import parameter_groups
from megalite.model.transformer import Stage
from megalite.parallel.grid import ALONE, Grid
from megalite.parallel.layers import RowLinear, placed
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Session, Trace
from megalite.prove.verify import Spread, Verdict, differences
from megalite.training.batches import LazyMicroBatches, MicroBatch
from megalite.training.step import tokens_that_count
from tests.families import file_reader
from tests.hf_tensors import from_hf
from tests.ranks import run_ranks
from tests.traces import Request, document, marked_corpus, nothing, traces

STEPS, LONG_STEPS, BATCH = 8, 20, 8
FULL = {"activation_checkpointing": "full"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SMALL_BUCKETS = {"reduce_bucket_size": 1000}  # less than most matrices have
Case = tuple[Layout, bool, dict[str, Any]]
"""A layout, whether embeddings are tied (a GPT-2 then, else a Llama), and keys of megalite.train or of ZeRO."""
# With micro-batches of 1 to 8 of 8 samples the accumulation is 1, 2, 4 and 8.
CASES: list[Case] = [
    (Layout(data=2, zero=0, micro=4), True, {}),
    (Layout(data=2, zero=0, micro=4), False, {}),
    (Layout(data=2, zero=1, micro=1), True, {}),
    (Layout(data=2, zero=2, micro=2), False, {}),
    (Layout(data=2, zero=3, micro=2), True, {}),
    (Layout(tensor=2, zero=1, micro=8), False, {}),
    (Layout(pipe=2, zero=0, micro=2), False, FULL),
    (Layout(pipe=2, zero=1, micro=8), True, {}),
    (Layout(pipe=2, zero=1, micro=8), False, {}),
    (Layout(pipe=4, zero=2, micro=2), True, {}),
    (Layout(pipe=4, zero=2, micro=2), False, {}),
    (Layout(pipe=2, tensor=2, zero=2, micro=1), True, {}),
    (Layout(pipe=2, tensor=2, zero=2, micro=4), False, {}),
    (Layout(pipe=2, data=2, zero=1, micro=2), True, {}),
    (Layout(pipe=2, data=2, zero=2, micro=1), False, {}),
    (Layout(tensor=2, data=2, zero=3, micro=1), False, {}),
    (Layout(pipe=2, tensor=2, data=2, zero=1, micro=4), True, {}),
    (Layout(pipe=2, tensor=2, data=2, zero=2, micro=1), False, FULL),
    (Layout(data=2, zero=1, micro=2), True, OFFLOAD),
    (Layout(data=2, zero=3, micro=2), True, OFFLOAD),
    (Layout(pipe=2, tensor=2, zero=2, micro=4), True, OFFLOAD),
    (Layout(data=2, zero=1, micro=4), True, SMALL_BUCKETS),
    (Layout(data=2, zero=3, micro=4), False, SMALL_BUCKETS),
    (Layout(pipe=2, data=2, zero=2, micro=2), True, SMALL_BUCKETS),
]
OTHERS: list[Case] = [
    (layout, not tied, keys)
    for layout, tied, keys in CASES
    if (layout, not tied, keys) not in CASES
]
PIPES = [case for case in CASES if case[0].world_size == case[0].pipe and not case[1]]


def name(case: Case) -> str:
    layout, tied, keys = case
    return ",".join([str(layout), "tied" if tied else "untied", *keys])


class Runs:
    """Records the cases that tests need, all cases of a world size at once."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.corpus = marked_corpus(folder / "corpus")
        self.recorded: dict[str, Trace] = {}

    def config(
        self, layout: Layout, tied: bool, keys: dict[str, Any], bf16: bool = False
    ) -> Config:
        json = document(self.corpus, "gpt2" if tied else "llama", tied, BATCH)
        json["bf16"] = {"enabled": bf16}
        for key, value in keys.items():
            section = (
                json["megalite"]["train"]
                if key in Train.model_fields
                else json["zero_optimization"]
            )
            section[key] = value
        return config_of(Config.from_dict(json), layout, BATCH)

    def request(
        self, case: Case, fault: Any = nothing, bf16: bool = False, label: str = ""
    ) -> Request:
        return self.config(*case, bf16).to_json(), fault, self.folder / (label or name(case))

    @cache  # noqa: B019  (one object, which lives as long as the module's tests)
    def alone(self, tied: bool) -> list[Trace]:
        """One process with the micro-batch sizes of verify_layouts."""
        layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
        return traces(1, self.steps, [self.request((layout, tied, {})) for layout in layouts])

    @cache  # noqa: B019
    def spread(self, tied: bool) -> Spread:
        reference, *others = self.alone(tied)
        return Spread(reference, others)

    def trace(self, case: Case) -> Trace:
        if name(case) not in self.recorded:
            world_size = case[0].world_size
            together = CASES if case in CASES else OTHERS
            cases = [other for other in together if other[0].world_size == world_size]
            found = traces(world_size, self.steps, [self.request(other) for other in cases])
            self.recorded |= dict(zip(map(name, cases), found, strict=True))
        return self.recorded[name(case)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Runs:
    steps = LONG_STEPS if pytestconfig.getoption("--long") else STEPS
    return Runs(tmp_path_factory.mktemp("layouts"), steps)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in OTHERS)], ids=name
)
def test_layout_equals_one_process(runs: Runs, case: Case) -> None:
    spread, trace = runs.spread(case[1]), runs.trace(case)
    assert max(row["norm"] for row in spread.reference.figures[0]) > 0.5, "clipping must act"
    assert trace.steps == runs.steps and all(rank == trace.figures[0] for rank in trace.figures)
    for one, other in zip(spread.reference.figures[0], trace.figures[0], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    verdict: Verdict = spread.judge(trace)
    assert not verdict.first, "; ".join(map(str, verdict.first))


@pytest.mark.parametrize("case", PIPES, ids=name)
def test_pipe_alone_changes_no_bit_of_an_untied_model(runs: Runs, case: Case) -> None:
    layout, _, _ = case
    request = runs.request(
        (Layout(zero=layout.zero, micro=layout.micro), False, {}), label=f"like {name(case)}"
    )
    one, other = traces(1, runs.steps, [request])[0], runs.trace(case)
    for step in range(runs.steps):
        assert [key for key, ratio, _ in differences(one, other, step) if ratio != 0] == []


@contextlib.contextmanager
def products_split_by_rows(parts: int) -> Iterator[None]:
    """Computes, in one process, products in parts as the tensor axis splits them by rows."""

    def forward(self: RowLinear, x: Tensor) -> Tensor:
        pieces = zip(x.chunk(parts, dim=-1), self.weight.chunk(parts, dim=1), strict=True)
        y = sum(F.linear(part, weight) for part, weight in pieces)
        return y if self.bias is None else y + self.bias  # type: ignore[return-value]

    with mock.patch.object(RowLinear, "forward", forward):
        yield


def in_two_parts(rank: int) -> contextlib.AbstractContextManager[None]:
    return products_split_by_rows(2)


def in_four_parts(rank: int) -> contextlib.AbstractContextManager[None]:
    return products_split_by_rows(4)


def test_bf16_differs_by_no_more_than_orders_of_summation(runs: Runs) -> None:
    """Five orders in one process: three micro-batch sizes, and products in two and four parts."""
    orders = [(4, nothing), (8, nothing), (1, nothing), (4, in_two_parts), (4, in_four_parts)]
    requests = [
        runs.request(
            (Layout(zero=1, micro=micro), False, {}),
            fault,
            bf16=True,
            label=f"bf16 {micro} {fault.__name__}",
        )
        for micro, fault in orders
    ]
    alone = [[row["loss"] for row in trace.figures[0]] for trace in traces(1, runs.steps, requests)]
    layouts = [
        Layout(pipe=2, data=2, zero=1, micro=2), Layout(pipe=2, tensor=2, zero=2, micro=2),
        Layout(tensor=2, data=2, zero=3, micro=2),
    ]  # fmt: skip
    requests = [
        runs.request((layout, False, {}), bf16=True, label=f"bf16 {layout}") for layout in layouts
    ]
    found = [[row["loss"] for row in trace.figures[0]] for trace in traces(4, runs.steps, requests)]
    largest = 0.0
    for step in range(runs.steps):
        largest = max(
            largest, *(abs(one[step] - other[step]) for one, other in combinations(alone, 2))
        )
        for layout, losses in zip(layouts, found, strict=True):
            assert abs(losses[step] - alone[0][step]) <= 3 * largest, f"{layout}, step {step + 1}"
    assert 0 < largest < 0.1


def plain_step(model: Callable[..., Tensor], batches: list[MicroBatch], weight: float) -> float:
    """Gradients of the mean over `weight` tokens; the sum of losses."""
    total = 0.0
    for number, (tokens, labels, context) in enumerate(batches):
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():  # type: ignore[attr-defined]
            loss = model(tokens, labels, context)
            (loss / weight).backward()
        total += loss.item()
    return total


def beside_torch(rank: int, world_size: int, config: dict[str, Any], steps: int) -> None:
    """ZeRO-0 on the data axis and DistributedDataParallel, on the same samples: every step is bitwise equal."""
    deepspeed.init_distributed("gloo")
    session = Session.build(Config.from_dict(config))
    params = session.config.document.optimizer.params  # type: ignore[union-attr]
    stage = Stage(read_spec(session.config.model), Grid()).initialise(session.config.train.seed)
    model = nn.parallel.DistributedDataParallel(stage)
    groups = parameter_groups(stage, params.weight_decay)
    adam = torch.optim.AdamW(groups, lr=params.lr, betas=(0.9, 0.999), eps=params.eps, fused=True)
    for step in range(steps):
        batches = session.batches(step)
        count = tokens_that_count(batches)
        torch.distributed.all_reduce(count)
        plain_step(model, batches, int(count) / world_size)
        norm = nn.utils.clip_grad_norm_(stage.parameters(), float("inf"))
        adam.step()
        adam.zero_grad()
        _, found = session.step(step)
        assert found == pytest.approx(norm.item(), rel=1e-6)
        for (ours, place), (theirs, _) in zip(
            placed(session.engine.stage), placed(stage), strict=True
        ):
            assert torch.equal(ours, theirs), f"step {step + 1}: {place.name}"


def test_zero_0_equals_distributed_data_parallel(runs: Runs) -> None:
    config = runs.config(Layout(data=2, zero=0, micro=2), True, {}).to_json() | {
        "gradient_clipping": 0.0
    }
    run_ranks(2, beside_torch, config, 8)


@pytest.mark.parametrize(
    "family, tied", [("llama", False), ("llama", True), ("gpt2", True), ("mixtral", False)]
)
def test_training_equals_transformers_and_torch(
    runs: Runs, tmp_path: Path, family: str, tied: bool
) -> None:
    """The same weights and batches through transformers' model, torch's AdamW and clip_grad_norm_."""
    steps = 8
    json = document(runs.corpus, family, tied, BATCH)
    if family == "mixtral":
        json["megalite"]["train"]["router"] = {"balance": "none"}  # theirs is per micro-batch
    settings = config_of(Config.from_dict(json), Layout(zero=0, micro=4), BATCH)
    ours = traces(1, steps, [(settings.to_json(), nothing, tmp_path / "ours")])[0]
    section = settings.model
    assert isinstance(section, dict)
    spec = read_spec(section)
    config = AutoConfig.for_model(**section)
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    model = AutoModelForCausalLM.from_config(config)
    read = file_reader(model.state_dict())
    with torch.no_grad():
        stage = Stage(spec, Grid()).initialise(settings.train.seed)
        values = {place.name: value for value, place in placed(stage)}
        for file_name, tensor in to_hf(spec, values, values.__getitem__):
            read(file_name).copy_(tensor)
    decays = [value for value in model.parameters() if value.dim() > 1]
    rest = [value for value in model.parameters() if value.dim() == 1]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-4, fused=True)
    data = TrainData(settings.data, settings.train.seed, section["vocab_size"])
    for step in range(steps):
        (batch,) = LazyMicroBatches(
            data, step * BATCH, BATCH, BATCH, ALONE, torch.device("cpu")
        ).read()
        logits = model(batch.tokens).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert ours.figures[0][step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert ours.figures[0][step]["norm"] == pytest.approx(norm.item(), rel=1e-4)
    for key, value, _ in ours.full(steps - 1):
        kind, _, called = key.partition("/")
        if kind == "weight":
            wanted = from_hf(spec, called, read).detach()
            assert (value - wanted).norm() < 1e-4 * wanted.norm() + 1e-6, called
