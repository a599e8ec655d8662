"""What a rank keeps of its forwards with each schedule: measurements during its actions, against predictions."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.transformer import Recompute, Stage
from megalite.parallel.collectives import Split
from megalite.parallel.deferred import _Products
from megalite.parallel.grid import Axis, Grid
from megalite.pipeline.actions import Pipeline, _TrainingStep
from megalite.pipeline.cut import ModelCosts
from megalite.pipeline.pipeline_plan import make_plan
from megalite.plan.activations import Forward
from megalite.plan.kept import kept_by
from megalite.programs.program import needs
from tests.small_models import MODELS, VOCABULARY

PIPE, COUNT, BATCH, LENGTH, LAYERS = 3, 6, 5, 24, 12
SOURCE = 14  # tokens of an encoder-decoder's source


class _Held:
    """Holds a tensor for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Engine:
    """The parts of DeepSpeed's engine that a Pipeline uses, without DeepSpeed."""

    device, hands_over_by_chunk, current_loss_scale = "cpu", False, 1.0

    def __init__(self, stage: Stage) -> None:
        self.module = self.stage = stage

    def __call__(self, *args: Any) -> Tensor:
        return self.stage(*args)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass


class Meter:
    """Bytes of the storages that a step keeps: in autograd, and between the halves of its backwards."""

    def __init__(self, step: _TrainingStep, stage: Stage) -> None:
        self.step, self.most = step, 0
        self.alive: weakref.WeakSet[_Held] = weakref.WeakSet()
        self.parameters = {value.untyped_storage().data_ptr() for value in stage.parameters()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> _Held:
            held = _Held(tensor)
            self.alive.add(held)
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            yield

    def look(self) -> None:
        tensors = [held.tensor for held in self.alive]
        for source, output in self.step.kept.values():
            tensors += [source, output]
        for waiting in self.step.waiting.values():
            for _, make in waiting._makers:
                cells = [cell.cell_contents for cell in make.__closure__ or ()]
                tensors += [value for value in cells if isinstance(value, Tensor)]
                for products in cells:
                    if isinstance(products, _Products):
                        tensors += [*products.slopes, products.rows]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.most = max(
            self.most, sum(size for at, size in storages.items() if at not in self.parameters)
        )


def measured(spec: Any, plan: Any, rank: int, recompute: Recompute, dtype: torch.dtype) -> int:
    """The most bytes that a rank keeps in a step of COUNT micro-batches, with invented messages."""
    axis = Axis(PIPE, rank, tuple(range(PIPE)), None)
    stage = Stage(spec, Grid(pipe=axis), plan.cut, recompute).initialise(1).to(dtype)
    pipeline = Pipeline(_Engine(stage), axis, plan, stage.hidden_shape(BATCH, LENGTH), dtype)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(COUNT):
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
        source = 0 if spec.stacks is None else SOURCE
        batches.append((ids, ids, Context(balance=torch.ones(BATCH), source=source)))
    step = _TrainingStep(pipeline, batches, 1.0)
    meter, local = Meter(step, stage), {}
    meter.parameters |= {  # tensors of the batch
        context.balance.untyped_storage().data_ptr() for _, _, context in batches
    }
    for action in plan.program(COUNT).actions[rank]:
        value = needs(action, plan.cut.last_chunk)
        if value is not None and value not in local:
            local[value] = torch.randn(pipeline.shape, dtype=dtype)
        with meter.watching():
            given = step.perform(action, local.pop(value) if value is not None else None)
        key = plan.program(COUNT).gives(action)
        if key is not None and not plan.program(COUNT).crosses(key):
            local[key] = given
        del given
        for parameter in stage.parameters():
            parameter.grad = None
        meter.look()
    return meter.most


@pytest.mark.parametrize("recompute", [0, "selective", 1, 2])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-v"])
def test_a_rank_keeps_what_is_predicted(schedule: str, recompute: Recompute) -> None:
    check_kept("llama", schedule, recompute)


@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        ("bert", "zb-h1"),
        ("bert", "zb-v"),
        ("modernbert", "zb-v"),
        ("qwen3_moe", "zb-v"),
        ("qwen2_moe", "zb-v"),
        ("ernie4_5_moe", "zb-v"),
        ("t5", "1f1b"),
        ("t5", "zb-h1"),
        ("t5", "zb-v"),
    ],
)
def test_a_rank_keeps_what_is_predicted_for_other_models(model: str, schedule: str) -> None:
    check_kept(model, schedule, 0)


def check_kept(model: str, schedule: str, recompute: Recompute) -> None:
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 48, "intermediate_size": 80}
    if model == "t5":
        sizes = {"num_layers": 7, "num_decoder_layers": 5, "d_model": 48, "d_ff": 80}
    config = {**MODELS[model], **sizes}
    spec, wrong = read_spec(config), []
    source = 0 if spec.stacks is None else SOURCE
    gc.disable()  # no tensor may depend on it to be freed
    try:
        for dtype in (torch.float32, torch.bfloat16):
            plan = make_plan(
                schedule,
                PIPE,
                2,
                None,
                ModelCosts.of(spec, LENGTH, recompute not in (0, "selective"), source=source),
            )
            for rank in range(PIPE):
                at = Forward(BATCH, LENGTH, dtype, Split(Grid().tensor), source=source)
                kept = kept_by(spec, plan, rank, recompute, at, COUNT)
                wanted = kept.bytes - max(kept.again, kept.logits)
                if recompute in (
                    1,
                    2,
                ):  # the context used for recomputation keeps them, which no hook sees
                    wanted -= sum(
                        chunk.table.get("angles", 0) * chunk.held for chunk in kept.chunks.values()
                    )
                found = measured(spec, plan, rank, recompute, dtype)
                if found != wanted:
                    counts = {
                        number: (chunk.held, chunk.waits) for number, chunk in kept.chunks.items()
                    }
                    wrong.append(f"{dtype} rank {rank}: kept {found}, predicted {wanted}: {counts}")
    finally:
        gc.enable()
    assert not wrong, "\n".join(wrong)
