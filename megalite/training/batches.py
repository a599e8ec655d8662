"""The samples that a rank computes in a step: a pure function of the position in the run and the rank's place.

Micro-batch k of data rank r holds the global batch's samples (k·d + r)·b … + b, so the order does not depend on the
data axis, and d and b may change between steps. The ranks of the context axis divide the tokens of the same samples.
They are read while the previous step runs (`Prefetcher`). Next: step.py.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.data.loader import TrainData
from megalite.data.position import Position
from megalite.model.context import Context
from megalite.model.dropout import Randomness
from megalite.model.varlen import (
    Bounds,
    RunPieces,
    documents_as_pieces,
    prefixes_as_pieces,
    runs_as_pieces,
)
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.loss import IGNORED
from megalite.parallel.rows import Rows

# Share of counting labels from which the head takes all rows: picking rows costs a copy.
LEAST_COUNTED = 0.5


class MicroBatch(NamedTuple):
    """Tokens and labels, int64 [B, S or S / c]; a label that does not count is -100. context: which of the samples'
    tokens these are, the document of each token if documents are kept apart, and in training the seed of dropout.
    """

    tokens: Tensor
    labels: Tensor
    context: Context


class SampleSource(Protocol):
    """A source of samples: returns the fields of a `Batch` for positions, each [n, S]."""

    def batch(self, positions: Sequence[int]) -> Any: ...


def own_positions(
    start: int, stop: int, micro: int, data_size: int, data_rank: int
) -> Iterator[list[int]]:
    """Positions in [start, stop) of each of this data rank's micro-batches."""
    for first in range(start + data_rank * micro, stop, data_size * micro):
        yield list(range(first, min(first + micro, stop)))


class MicroBatches(Protocol):
    """A list of micro-batches, or `LazyMicroBatches`."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> MicroBatch: ...


class LazyMicroBatches:
    """This rank's micro-batches of `count` samples from position `start` on. Each is read and moved to the device every
    time it is indexed; none is kept.

    If `count` does not fill the micro-batches, samples without counting labels are added, so that all ranks have
    equally many micro-batches of one shape. draw: the run's seed and the optimizer step, in training. rows: this rank's
    tokens of each sample; None: all. source: number of source tokens per sample of an encoder-decoder.
    """

    def __init__(
        self,
        samples: SampleSource,
        start: int,
        count: int,
        micro: int,
        data: Axis,
        device: torch.device,
        draw: tuple[int, int] | None = None,
        rows: Rows | None = None,
        source: int = 0,
    ) -> None:
        rounds = -(-count // (micro * data.size))
        stop = start + rounds * micro * data.size
        self.positions = [*own_positions(start, stop, micro, data.size, data.rank)]
        self.device = device
        self._read = partial(
            _micro_batch, samples, stop=start + count, draw=draw, rows=rows, source=source
        )

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int, /) -> MicroBatch:
        batch = self._read(self.positions[number])
        return on_device(pinned(batch, self.device), self.device)

    def read(self) -> list[MicroBatch]:
        """All micro-batches."""
        return [self[number] for number in range(len(self))]


def _micro_batch(
    samples: SampleSource,
    positions: list[int],
    stop: int,
    draw: tuple[int, int] | None,
    rows: Rows | None,
    source: int,
) -> MicroBatch:
    real = [position for position in positions if position < stop]
    # The last position is repeated as padding.
    ids, wanted, documents, prefixes = Batch(
        *samples.batch([p if p < stop else stop - 1 for p in positions])
    )
    tokens, labels = (torch.from_numpy(np.array(values)) for values in (ids, wanted))
    labels[len(real) :] = IGNORED
    context = Context(rows=rows, source=source)
    if documents is not None:
        context.documents = torch.from_numpy(documents)
        if rows is not None and not rows.by_heads:
            context.run_pieces = runs_as_pieces(documents, rows.runs)
        elif not source:  # two stacks do not use pieces
            context.bounds = documents_as_pieces(documents)
        if prefixes is not None:
            context.prefixes = torch.from_numpy(prefixes)
            context.halves = prefixes_as_pieces(documents, prefixes)
    if rows is not None:
        tokens, labels = rows.cut(tokens, 1), rows.cut(labels, 1)
    asked = labels[:, source:] != IGNORED
    counted = asked.flatten().nonzero().squeeze(-1)
    if len(counted) < LEAST_COUNTED * asked.numel():
        context.counted = counted
    if draw is not None:
        context.randomness = Randomness(*draw, torch.tensor(positions))
    return MicroBatch(tokens, labels, context)


def step_batches(
    config: Config,
    data: TrainData,
    grid: Grid,
    position: Position,
    device: torch.device,
    training: bool = True,
) -> list[MicroBatch]:
    """This rank's micro-batches of the step at `position`. training: False for an evaluation, without dropout."""
    start = position.consumed_samples
    return LazyMicroBatches(
        data.at(position, config.train.last_step),
        start,
        config.batch_plan.size(start),
        config.micro_batch_size,
        grid.data,
        device,
        (config.train.seed, position.step) if training else None,
        rows_of(config, grid),
        config.data.source_length,
    ).read()


def rows_of(config: Config, grid: Grid) -> Rows | None:
    """The tokens of each sample that this rank of a training run holds; None: all."""
    by_heads = config.parallel.context_attention == "heads"
    return Rows.along(grid.context, config.data.sequence_length, by_heads)


def pinned(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch in main memory, page-locked unless the device is the CPU, so that copies are asynchronous."""
    return batch if device.type == "cpu" else _mapped(batch, Tensor.pin_memory)


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch on the device; copies from page-locked memory are queued after the device's current work."""
    return (
        batch
        if device.type == "cpu"
        else _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))
    )


def _mapped(batch: MicroBatch, change: Callable[[Tensor], Tensor]) -> MicroBatch:
    """A micro-batch with `change` applied to each of its tensors."""
    tokens, labels, context = batch
    documents, bounds, runs = context.documents, context.bounds, context.run_pieces
    prefixes, halves = context.prefixes, context.halves
    counted, randomness = context.counted, context.randomness

    def moved(bounds: Bounds) -> Bounds:
        return bounds._replace(starts=change(bounds.starts))

    context = replace(
        context,
        documents=None if documents is None else change(documents),
        bounds=None if bounds is None else moved(bounds),
        prefixes=None if prefixes is None else change(prefixes),
        halves=None if halves is None else moved(halves),
        run_pieces=None
        if runs is None
        else tuple(
            RunPieces(change(run.keys), moved(run.queries), moved(run.of_keys)) for run in runs
        ),
        counted=None if counted is None else change(counted),
        randomness=None
        if randomness is None
        else replace(randomness, samples=change(randomness.samples)),
    )
    return MicroBatch(change(tokens), change(labels), context)


Read = Callable[[Position], list[MicroBatch]]
"""Reads this rank's micro-batches of the step that starts at a position, into main memory."""
_Key = tuple[int, int, tuple[tuple[int, int], ...]]


class Prefetcher:
    """Reads the next step's micro-batches while a step runs, into memory that a GPU copies from without blocking.

    What is read depends only on the position in the run, so it is used only if it is for exactly the position that is
    asked for. A run that rewinds or ends has read a step in vain. read: always called in the same thread.
    """

    def __init__(self, read: Read, device: torch.device) -> None:
        self.read, self.device = read, device
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=self._begin)
        self.coming: tuple[_Key, Future[list[MicroBatch]]] | None = None

    def take(self, position: Position, following: Position | None) -> list[MicroBatch]:
        """The micro-batches of the step at `position`, on the device; then starts reading those at `following`. Raises
        the errors of reading."""
        coming = self.coming
        if coming is None or coming[0] != _key(position):
            coming = self._submit(position)
        made = coming[1].result()
        self.coming = None if following is None else self._submit(following)
        return [on_device(batch, self.device) for batch in made]

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _submit(self, position: Position) -> tuple[_Key, "Future[list[MicroBatch]]"]:
        return _key(position), self.thread.submit(self._read, position)

    def _read(self, position: Position) -> list[MicroBatch]:
        return [pinned(batch, self.device) for batch in self.read(position)]

    def _begin(self) -> None:
        # A new thread uses GPU 0, where every rank would then take memory.
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index or 0)


def _key(position: Position) -> _Key:
    """The parts of a position on which its batches depend."""
    return position.step, position.consumed_samples, position.left_out
