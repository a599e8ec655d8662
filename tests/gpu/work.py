"""What ranks on GPUs do for the tests of this folder; arguments and results are JSON."""

import dataclasses
import itertools
import re
import time
import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megalite.config import Config
from megalite.engine.over_fakes import deepspeed_over_fakes
from megalite.guard.flight import own_flight
from megalite.model.attention import attend
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.varlen import documents_as_pieces
from megalite.parallel.grid import Grid
from megalite.pipeline.interpreter import Interpreter
from megalite.pipeline.mailbox import Mailbox
from megalite.plan.dry_run import fake_world
from megalite.plan.states import DTYPES, States, parameter_sizes, peak_bytes, predicted_states
from megalite.prove import trace
from megalite.prove.trace import Session
from megalite.ranks.devices import be_deterministic
from megalite.ranks.launch import stop_ranks
from megalite.training.mfu import Utilisation, peak_flops


def losses(config: dict[str, Any], steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, in deterministic mode where the config says so."""
    resolved = Config.from_dict(config)
    if resolved.train.deterministic:
        be_deterministic()
    session = Session.build(resolved)
    return [session.step(step) for step in range(steps)]


def device() -> dict[str, Any]:
    """Where this rank computes, what torch was told at its start, and the collectives that the watchdog would see."""
    current = torch.accelerator.current_accelerator()
    dist.all_reduce(torch.ones(1, device=current))
    torch.accelerator.synchronize()
    snapshot: Any = torch.cuda.memory._snapshot()
    return {
        "name": torch.cuda.get_device_name(), "ordinal": torch.accelerator.current_device_index(),
        "expandable_segments": snapshot["allocator_settings"]["expandable_segments"],
        "backend": dist.get_backend_config(), "flight": bool(own_flight()),
    }  # fmt: skip


def states(config: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of model states that this rank was told to hold, and those that it held in a step."""
    return _states(Config.from_dict(config))


def true_size(config: dict[str, Any], rank: int) -> tuple[dict[str, int], dict[str, int], int]:
    """The same of a rank of the config's world, alone on this GPU, over groups that go nowhere; and its peak."""
    resolved = Config.from_dict(config)
    stop_ranks()
    trace._grid.cache_clear()
    received = Mailbox.take

    def take(self: Mailbox, key: Any) -> torch.Tensor:
        return received(
            self, key
        ).zero_()  # nothing was received, and memory as it was may hold NaN

    def gather(result: list[Any], value: Any, group: Any = None) -> None:
        result[:] = [value] * len(result)

    with (
        fake_world(resolved.world_size, rank),
        deepspeed_over_fakes(),
        mock.patch.object(dist, "all_gather_object", gather),
        mock.patch.object(Mailbox, "take", take),
    ):
        told, held = _states(resolved)
        accelerator: Any = get_accelerator()
        return told, held, peak_bytes(torch.device(accelerator.current_device_name()))


def _states(resolved: Config) -> tuple[dict[str, int], dict[str, int]]:
    session = Session.build(resolved)
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
    """How often the host waited for the device in each step; an error where it did in a forward or backward.

    torch's debug mode sees reads, blocking copies and waits for a stream, but none for the whole device, such as those
    of DeepSpeed's timers: they are counted here. Waits for events are not: they keep ZeRO-3 close to the device."""
    session = Session.build(Config.from_dict(config))
    for step in range(2):  # makes what is made at the first use
        session.step(step)
    run, counts, of_device = Interpreter.run, [], [0]

    def strict(self: Interpreter, *args: Any) -> None:
        before = of_device[0]
        torch.cuda.set_sync_debug_mode("error")
        run(self, *args)
        torch.cuda.set_sync_debug_mode("warn")
        if of_device[0] > before:
            raise RuntimeError("a forward or backward waited for the whole device")

    def counted(wait: Any) -> Any:
        def call(*args: Any) -> None:
            of_device[0] += 1
            wait(*args)

        return call

    for step in range(2, 2 + steps):
        batches = session.batches(step)
        torch.cuda.synchronize()
        of_device[0] = 0
        with (
            warnings.catch_warnings(record=True) as told,
            mock.patch.object(Interpreter, "run", strict),
            mock.patch.object(torch.cuda, "synchronize", counted(torch.cuda.synchronize)),
            mock.patch.object(
                torch.accelerator, "synchronize", counted(torch.accelerator.synchronize)
            ),
        ):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            session.train(batches)
            torch.cuda.set_sync_debug_mode("default")
        read = sum("synchroniz" in str(warning.message) for warning in told)
        counts.append(read + of_device[0])
    return counts


def throughput(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Figures of all ranks over `steps` steps, batches read beforehand; the peak of this one."""
    resolved = Config.from_dict(config)
    session, spec = Session.build(resolved), read_spec(resolved.model)
    device = torch.device(session.engine.device or "cpu")
    batches = session.batches(0)
    for _ in range(2):
        session.train(batches)
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(steps):
        session.train(batches)
    _wait_for(device)
    tokens = steps * resolved.train_batch_size * resolved.data.sequence_length
    rate = tokens / (time.perf_counter() - start)
    peak = peak_flops(device, DTYPES[resolved.precision])
    flops = spec.flops_per_token(resolved.data.sequence_length, resolved.data.counted_share)
    return {
        "parameters": spec.num_parameters, "tokens_per_second": rate, "peak_bytes": peak_bytes(device),
        **Utilisation(flops, peak, resolved.world_size).row(rate),
    }  # fmt: skip


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def kernels(device: str = "cuda") -> dict[str, list[str]]:
    """Names of the kernels of attention forward and backward: causal, in a window, and of packed documents; and of an
    encoder."""
    b, n, k, s, h, cuda = 2, 8, 2, 512, 64, torch.device(device)
    documents = np.cumsum(np.random.default_rng(0).random((b, s)) < 0.05, axis=1).astype(np.int32)
    bounds = documents_as_pieces(documents)
    packed = Context(documents=torch.from_numpy(documents).to(cuda),
                     bounds=bounds._replace(starts=bounds.starts.to(cuda)))  # fmt: skip
    cases = {
        "causal": (Context(), None, True), "window": (Context(), 100, True), "documents": (packed, None, True),
        "all": (Context(), None, False), "window to both sides": (Context(), 100, False),
        "documents of an encoder": (packed, None, False),
    }  # fmt: skip
    kind = torch.profiler.ProfilerActivity
    found: dict[str, list[str]] = {}
    for name, (context, window, causal) in cases.items():
        shapes = [(b, heads, s, h) for heads in (n, k, k)]
        query, key, value = (
            torch.randn(shape, device=cuda, dtype=torch.bfloat16, requires_grad=True)
            for shape in shapes
        )
        activity = kind.CPU if device == "cpu" else kind.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            attend(query, key, value, context, window, causal, None, 0.0).sum().backward()
            _wait_for(cuda)
        found[name] = sorted({re.sub(r"<.*", "", event.key) for event in profile.key_averages()})
    return found


def attention_differences(device: str = "cuda") -> dict[str, float]:
    """Largest difference between attention in bf16 on the GPU and in fp32 on the CPU, as a share of the largest value:
    of the result and of the gradients, for windows and documents, in decoders and encoders."""
    b, n, k, s, h = 2, 8, 2, 256, 64
    documents = np.cumsum(np.random.default_rng(0).random((b, s)) < 0.05, axis=1).astype(np.int32)
    generator, found = torch.Generator().manual_seed(0), {}
    plain = [torch.randn(b, heads, s, h, generator=generator).bfloat16() for heads in (n, k, k)]
    windows = {"window": 100, "documents": None, "both": 30}
    for name, causal in itertools.product(windows, (True, False)):
        window = windows[name]
        results: list[list[torch.Tensor]] = []
        for place, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
            context, bounds = Context(), documents_as_pieces(documents)
            if name != "window":
                context.documents = torch.from_numpy(documents).to(place)
                context.bounds = bounds._replace(starts=bounds.starts.to(place))
            query, key, value = (x.to(place, dtype, copy=True).requires_grad_() for x in plain)
            mixed = attend(query, key, value, context, window, causal, None, 0.0)
            mixed.float().square().sum().backward()
            made = [mixed.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)]
            results.append([x.float().cpu() for x in made])
        found[f"{name}, causal" if causal else name] = max(
            float((x - y).abs().max() / x.abs().max()) for x, y in zip(*results, strict=True)
        )
    return found
