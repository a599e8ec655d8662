"""A full record of a few steps of a run: losses, norms, and every rank's masters and Adam moments, with a resume from a
checkpoint halfway and an evaluation at the end.

`record` runs on the ranks; `Trace` reassembles a recorded step, tensor by tensor. Next: verify.py, which
compares traces of layouts.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint.boxes import boxes_of_shard
from megalite.checkpoint.save import Saver, owned_boxes
from megalite.config import Config
from megalite.config.optimizer_keys import OPTIMIZERS
from megalite.data.loader import TrainData
from megalite.data.position import Position
from megalite.engine.build import LearningRate, build_engine, build_pipeline
from megalite.engine.engine import Engine
from megalite.engine.zero import MOMENTS
from megalite.model.families import model_dict, read_spec
from megalite.parallel.grid import Grid
from megalite.pipeline.actions import Pipeline
from megalite.training.batches import MicroBatch, step_batches
from megalite.training.evaluation import loss_and_tokens
from megalite.training.start import starting_point
from megalite.training.step import train_step

KINDS = (*MOMENTS, "weight")  # in the order in which an error spreads


@functools.cache
def _grid(pipe: int, tensor: int, context: int, expert: int) -> Grid:
    """A grid, cached per process, because every grid creates its own process groups."""
    return Grid.build(pipe, tensor, context, expert)


@dataclass
class Session:
    """A newly built run on this rank that can be stepped without a run folder."""

    config: Config
    engine: Engine
    pipeline: Pipeline
    data: TrainData
    rate: LearningRate

    @classmethod
    def build(cls, config: Config) -> "Session":
        """Builds a session from a resolved config (collective over the world)."""
        spec, parallel = read_spec(config.model), config.parallel
        grid = _grid(parallel.pipe, parallel.tensor, parallel.context, parallel.expert)
        engine = build_engine(config, spec, grid)
        data = TrainData(config.data, config.train.seed, spec.vocabulary_size, check=False)
        return cls(
            config, engine, build_pipeline(engine, config, spec), data, LearningRate(engine, config)
        )

    def position(self, step: int) -> Position:
        """The position before a step."""
        samples = self.config.batch_plan.consumed(step)
        return Position(step, samples, samples * self.config.data.sequence_length)

    def batches(self, step: int, training: bool = True) -> list[MicroBatch]:
        """This rank's micro-batches of a step. training: False for an evaluation."""
        device, grid = torch.device(self.engine.device or "cpu"), self.engine.grid
        return step_batches(self.config, self.data, grid, self.position(step), device, training)

    def train(self, batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Runs one optimizer step on `batches` (train_step); the host waits only for the norm."""
        return train_step(self.pipeline, self.engine.grid.replica, batches)

    def step(self, step: int) -> tuple[float, float]:
        """Runs one optimizer step; returns (loss, mean over the global batch in nats; gradient norm before
        clipping)."""
        self.rate.set(self.position(step))
        total, weight = self.train(self.batches(step))
        grid, total = self.engine.grid, total.double()
        dist.all_reduce(total)
        return (total / (grid.tensor.size * weight)).item(), float(
            self.engine.get_global_grad_norm() or 0.0
        )

    def evaluate(self, step: int) -> float:
        """The mean loss of the samples that a step would train on, computed as in a run's evaluation."""
        loss, tokens, *_ = loss_and_tokens(self.pipeline, self.batches(step, training=False))
        return (loss / tokens.clamp(min=1)).item()

    def resumed(self, step: int, run_dir: Path) -> "Session":
        """A new session that resumes after `step` steps from a checkpoint that this one writes (collective)."""
        saver, grid = Saver(run_dir, keep=0), self.engine.grid
        boxes = owned_boxes(self.engine.shards(), grid, replicated=self.config.zero_stage == 0)
        state = {
            **asdict(self.position(step)),
            **(self.engine.router_bias.state if self.engine.router_bias is not None else {}),
            "seed": self.config.train.seed,
            "model": model_dict(self.config.model),
        }
        saver.save(step, boxes, state)
        saver.wait()
        session = Session.build(self.config)
        starting_point(run_dir, None).fill(session.engine)
        session.rate.start_at(step)
        return session


Plant = Callable[[Session, str, contextlib.ExitStack], None]
"""Plants a fault in a session (mutants.py): called when it is "built" and when it has "resumed". Changes outside the
session are undone by the stack."""


def no_plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """Changes nothing."""


def record(config: Config, steps: int, folder: Path, plant: Plant = no_plant) -> None:
    """Trains `steps` steps, resumes after the first half, evaluates at the end, and writes this rank's tensors before
    the first step and after each step into `folder` (collective)."""
    with contextlib.ExitStack() as stack:
        session, rank = Session.build(config), dist.get_rank()
        plant(session, "built", stack)
        figures: list[dict[str, float]] = []
        slices = _write_tensors(session.engine, folder / f"start_rank{rank}.safetensors")
        for step in range(steps):
            loss, norm = session.step(step)
            figures.append({"loss": loss, "norm": norm})
            slices |= _write_tensors(session.engine, folder / f"step{step}_rank{rank}.safetensors")
            if step + 1 == (steps + 1) // 2 < steps:
                session = session.resumed(step + 1, folder / "run")
                plant(session, "resumed", stack)
        figures[-1]["evaluation"] = session.evaluate(steps)
        written = {"figures": figures, "slices": slices, "adam": _adam(config)}
        (folder / f"rank{rank}.json").write_text(json.dumps(written))


def _adam(config: Config) -> dict[str, Any] | None:
    """Adam's parameters, with the learning rates of parameter groups as pairs of (pattern of names, ratio); None for
    another optimizer."""
    params, defaults = config.optimizer.params, OPTIMIZERS[config.optimizer.type]
    if "betas" not in defaults:
        return None
    groups = [(entry.match, entry.lr_ratio) for entry in config.train.parameter_groups]
    (beta1, beta2), eps = params.betas or defaults["betas"], params.eps or defaults["eps"]
    return {"lr": params.lr, "groups": groups, "beta1": beta1, "beta2": beta2, "eps": eps}


def _write_tensors(engine: Engine, path: Path) -> dict[str, dict[str, Any]]:
    """Writes masters and moments; returns the slice of each in its full tensor, by key."""
    tensors: dict[str, Tensor] = {}
    slices: dict[str, dict[str, Any]] = {}
    for shard in engine.shards():
        placement = shard.placement
        for kind, values in {"weight": shard.master, **shard.state}.items():
            key = f"{kind}/{placement.name}"
            tensors[key] = values.detach().cpu().clone()
            slices[key] = {
                "full_shape": placement.full_shape,
                "shape": placement.shape,
                "offsets": placement.offsets,
                "start": shard.start,
                "counted": placement.counted,
            }
    save_file(tensors, path)
    return slices


@dataclass
class Piece:
    """A box of a full tensor that one rank holds. counted: whether it is not a copy of another rank's."""

    rank: int
    counted: bool
    offsets: tuple[int, ...]
    values: Tensor

    def cut(self, full: Tensor) -> Tensor:
        """The same box of a full tensor (a view)."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.values.shape, strict=True)):
            full = full.narrow(dim, offset, size)
        return full


class Trace:
    """The output of `record` on all ranks. figures[rank][step] has loss and norm, in the last step also the
    evaluation. adam: Adam's parameters (`_adam`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ranks = range(len(list(folder.glob("rank*.json"))))
        written = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks]
        self.figures: list[list[dict[str, float]]] = [rank["figures"] for rank in written]
        self.slices: list[dict[str, dict[str, Any]]] = [rank["slices"] for rank in written]
        self.adam: dict[str, Any] | None = written[0]["adam"]
        self._usual: dict[int, dict[str, float]] = {}
        self._weights: tuple[int, dict[str, Tensor]] = -2, {}

    @property
    def steps(self) -> int:
        return len(self.figures[0])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes by `kind/name` of every tensor of the model, by kind in the order of KINDS."""
        shapes = {
            key: tuple(slice["full_shape"])
            for slices in self.slices
            for key, slice in slices.items()
        }
        return dict(
            sorted(
                shapes.items(), key=lambda item: (KINDS.index(item[0].partition("/")[0]), item[0])
            )
        )

    def pieces(self, step: int) -> dict[str, list[Piece]]:
        """By key, all pieces that the ranks hold after a step; step -1: before the first one."""
        result: dict[str, list[Piece]] = {}
        for rank, slices in enumerate(self.slices):
            name = f"step{step}" if step >= 0 else "start"
            with safe_open(self.folder / f"{name}_rank{rank}.safetensors", "pt") as file:
                held = set(file.keys())
                for key, slice in slices.items():
                    if key not in held:
                        continue
                    shape, offsets, start = (
                        tuple(slice["shape"]),
                        tuple(slice["offsets"]),
                        slice["start"],
                    )
                    for box in boxes_of_shard(
                        self.shapes[key], shape, offsets, start, file.get_tensor(key)
                    ):
                        result.setdefault(key, []).append(
                            Piece(rank, slice["counted"], box.offsets, box.values)
                        )
        return result

    def usual(self, step: int) -> dict[str, float]:
        """By kind, the usual size of an element after a step: the root mean square over all tensors."""
        if step not in self._usual:
            sums: dict[str, tuple[float, int]] = {}
            for key, full, _ in self.full(step):
                kind = key.partition("/")[0]
                squares, count = sums.get(kind, (0.0, 0))
                sums[kind] = squares + full.double().square().sum().item(), count + full.numel()
            self._usual[step] = {
                kind: (squares / count) ** 0.5 for kind, (squares, count) in sums.items()
            }
        return self._usual[step]

    def weights(self, step: int) -> dict[str, Tensor]:
        """The full weights after a step by name; step -1: before the first one."""
        if self._weights[0] != step:
            found = {
                key.partition("/")[2]: full
                for key, full, _ in self.full(step)
                if key.startswith("weight/")
            }
            self._weights = step, found
        return self._weights[1]

    def full(self, step: int) -> Iterator[tuple[str, Tensor, list[Piece]]]:
        """Each full tensor after a step, assembled from the pieces that count; NaN where no rank holds one."""
        pieces = self.pieces(step)
        for key, shape in self.shapes.items():
            if key not in pieces:
                continue
            whole = torch.full(shape, torch.nan)
            for piece in reversed(pieces[key]):  # of equal copies (ZeRO-0) the first rank's is kept
                if piece.counted:
                    piece.cut(whole).copy_(piece.values)
            yield key, whole, pieces[key]
