"""What ranks on GPUs do for the tests of this folder; arguments and results are JSON."""

import dataclasses
import re
import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megalite.config import Config
from megalite.model.attention import attend
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.varlen import documents_as_pieces
from megalite.parallel.grid import Grid
from megalite.pipeline.interpreter import Interpreter
from megalite.plan.states import States, parameter_sizes, predicted_states
from megalite.prove.trace import Session
from megalite.ranks.devices import be_deterministic


def losses(config: dict[str, Any], steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, in deterministic mode where the config says so."""
    resolved = Config.from_dict(config)
    if resolved.train.deterministic:
        be_deterministic()
    session = Session.build(resolved)
    return [session.step(step) for step in range(steps)]


def device() -> dict[str, Any]:
    """Where this rank computes, and what torch was told at its start."""
    current = torch.accelerator.current_accelerator()
    torch.empty(1, device=current)
    snapshot: Any = torch.cuda.memory._snapshot()
    return {
        "name": torch.cuda.get_device_name(), "ordinal": torch.accelerator.current_device_index(),
        "expandable_segments": snapshot["allocator_settings"]["expandable_segments"],
        "backend": dist.get_backend_config(),
    }  # fmt: skip


def states(config: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of model states that this rank was told to hold, and those that it held in a step."""
    session = Session.build(resolved := Config.from_dict(config))
    with session.engine.weighed() as held:
        session.step(0)
    grid = session.engine.grid
    place = Grid.at(grid.rank, grid.pipe.size, grid.data.size, grid.tensor.size)
    told = predicted_states(
        resolved, parameter_sizes(resolved, read_spec(resolved.model), place), place
    )
    now = States(
        held["weights_bytes"], held["gradients_bytes"], held["optimizer_bytes"], told.buckets
    )
    return dataclasses.asdict(told), dataclasses.asdict(now)


def waits(config: dict[str, Any], steps: int) -> list[int]:
    """How often the host waited for the device in each step; an error where it did in a forward or backward."""
    session = Session.build(Config.from_dict(config))
    for step in range(2):  # makes what is made at the first use
        session.step(step)
    run, counts = Interpreter.run, []

    def strict(self: Interpreter, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        run(self, *args)
        torch.cuda.set_sync_debug_mode("warn")

    with mock.patch.object(Interpreter, "run", strict):
        for step in range(2, 2 + steps):
            batches = session.batches(step)
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                session.train(batches)
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(warning.message) for warning in told))
    return counts


def kernels() -> dict[str, list[str]]:
    """Names of the kernels of attention forward and backward: causal, in a window, and of packed documents."""
    b, n, k, s, h, cuda = 2, 8, 2, 512, 64, torch.device("cuda")
    documents = np.cumsum(np.random.default_rng(0).random((b, s)) < 0.05, axis=1).astype(np.int32)
    bounds = documents_as_pieces(documents)
    packed = Context(documents=torch.from_numpy(documents).to(cuda),
                     bounds=bounds._replace(starts=bounds.starts.to(cuda)))  # fmt: skip
    cases = {"causal": (Context(), None), "window": (Context(), 100), "documents": (packed, None)}
    found: dict[str, list[str]] = {}
    for name, (context, window) in cases.items():
        shapes = [(b, heads, s, h) for heads in (n, k, k)]
        query, key, value = (
            torch.randn(shape, device=cuda, dtype=torch.bfloat16, requires_grad=True)
            for shape in shapes
        )
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            attend(query, key, value, context, window, None, 0.0).sum().backward()
            torch.cuda.synchronize()
        found[name] = sorted({re.sub(r"<.*", "", event.key) for event in profile.key_averages()})
    return found


def attention_differences() -> dict[str, float]:
    """Largest difference between attention in bf16 on the GPU and in fp32 on the CPU, as a share of the largest value:
    of the result and of the gradients, for windows and documents."""
    b, n, k, s, h = 2, 8, 2, 256, 64
    documents = np.cumsum(np.random.default_rng(0).random((b, s)) < 0.05, axis=1).astype(np.int32)
    generator, found = torch.Generator().manual_seed(0), {}
    plain = [torch.randn(b, heads, s, h, generator=generator).bfloat16() for heads in (n, k, k)]
    for name, window in (("window", 100), ("documents", None), ("both", 30)):
        results: list[list[torch.Tensor]] = []
        for place, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
            context, bounds = Context(), documents_as_pieces(documents)
            if name != "window":
                context.documents = torch.from_numpy(documents).to(place)
                context.bounds = bounds._replace(starts=bounds.starts.to(place))
            query, key, value = (x.to(place, dtype).requires_grad_() for x in plain)
            mixed = attend(query, key, value, context, window, None, 0.0)
            mixed.float().square().sum().backward()
            results.append(
                [x.float().cpu() for x in (mixed.detach(), query.grad, key.grad, value.grad)]
            )  # type: ignore[union-attr]
        found[name] = max(
            float((x - y).abs().max() / x.abs().max()) for x, y in zip(*results, strict=True)
        )
    return found
