"""Finds, checks and reads checkpoints in a single process, without ranks.

    checkpoint = Checkpoint.open(find_checkpoint("runs/x"))
    checkpoint.state["step"], checkpoint.read("layers.0.attention.query.weight")

Next: save.py and weights.py, in which all ranks save and load together.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite import other_formats
from megalite.checkpoint.folder import (
    BEST,
    FORMAT_OF_PARTS,
    INDEX,
    LATEST,
    REPLACED_NAME,
    STATE,
    STEP_NAME,
    SUMS,
    Entry,
    Index,
    StoredBox,
    Transaction,
    check_carried,
    check_file,
    read_checked_json,
    read_sums,
)
from megalite.checkpoint.parts import PartIndex
from megalite.checkpoint.tensors_file import TensorFiles, write_tensors
from megalite.errors import CheckpointError

WEIGHT = "weight"
ROUTER_BIAS = "router_bias"
"""Key of the state: for each layer with experts, in order, a list of numbers."""
_STATE_KINDS: dict[str, tuple[type, ...]] = {  # types of the state's optional keys
    "layout": (dict, type(None)), "tokenizer": (str, type(None)), "data": (dict,), "optimizer": (str, type(None)),
    "sequence_length": (int,), ROUTER_BIAS: (list,), "best": (dict,),
    "owes_evaluation": (bool,), "faults_in_a_row": (int,), "faulty_step": (int,),
}  # fmt: skip
# Most bytes of a file that CheckpointWriter writes, which it holds in memory until then.
FILE_BYTES = 1 << 28


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its folder's name; None for any other name."""
    match = STEP_NAME.match(path.name) or REPLACED_NAME.match(path.name)
    return int(match[1]) if match else None


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder by step, oldest first. Unpublished folders are not included; a folder that was
    renamed to be replaced is, if a kill came before its replacement was in place."""
    folder = run_dir / "checkpoints"
    found = {}
    for path in (*sorted(folder.glob(".step_*.replaced")), *folder.glob("step_*")):
        step = step_of(path)
        if step is not None:
            found[step] = path
    return [found[step] for step in sorted(found)]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user's path refers to: the path itself, the one that `RUN/checkpoints/best` names, or the
    newest good one of a run folder or of its `checkpoints` folder. All its files are checked. Raises CheckpointError if
    there is none, naming each damaged one."""
    path = Path(path)
    if path.parent.name == "checkpoints" and path.name == BEST and path.is_file():
        path = path.parent / (named_best(path.parent.parent) or path.name)
    if (path / SUMS).exists() or (path / STATE).exists():
        verify(path)
        return path
    run_dir = path.parent if path.name == "checkpoints" else path
    good, damaged = newest_good(run_dir)
    if good is not None:
        return good
    if damaged:
        raise CheckpointError("; ".join(map(str, damaged)))
    rule = "contains no checkpoint: must be a run folder or its checkpoints/step_…"
    raise CheckpointError(f"{path}: {other_formats.weights(path) or rule}")


def newest_good(run_dir: Path) -> tuple[Path | None, list[CheckpointError]]:
    """The newest undamaged checkpoint of a run, and the errors of all newer ones."""
    damaged: list[CheckpointError] = []
    for path in reversed(checkpoints_of(run_dir)):
        try:
            verify(path)
            return path, damaged
        except CheckpointError as error:
            damaged.append(error)
    return None, damaged


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Checks every file's SHA-256, before anything in it is parsed. Ranks may divide the files, and the cores, as
    `part` of `parts`. Raises CheckpointError that names the first damaged file."""
    sums = read_sums(folder)
    check_carried(folder, sums)
    ours = sorted(sums.items())[part::parts]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // parts)) as pool:
        for _ in pool.map(lambda item: check_file(folder, *item), ours):
            pass


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state, without its index, after its SHA-256 has been checked. Raises CheckpointError."""
    return read_checked_json(folder, STATE, read_sums(folder)[STATE])


@dataclass
class Checkpoint:
    """An open checkpoint. state: step, consumed_samples, consumed_tokens, seed, layout; model: the Hugging Face
    config; index: every tensor."""

    folder: Path
    state: dict[str, Any]
    model: dict[str, Any]
    index: Index

    def __post_init__(self) -> None:
        self.files = TensorFiles(self.folder)

    @classmethod
    def open(cls, path: str | Path, part: int = 0, parts: int = 1) -> "Checkpoint":
        """Reads state and index, each after its SHA-256 has been checked (`verify` checks the tensors' files). Ranks
        may divide the check of the files' sizes, as `part` of `parts`."""
        folder = Path(path)
        sums = read_sums(folder)
        state = read_checked_json(folder, STATE, sums[STATE])
        value = read_checked_json(folder, INDEX, sums[INDEX])
        kind = PartIndex if state["format"] == FORMAT_OF_PARTS else Index
        try:
            index, model = kind.from_json(value), state["model"]
            index.check_whole()
            for key in ("step", "consumed_samples", "consumed_tokens", "seed"):
                if not isinstance(state[key], int) or state[key] < 0:
                    raise ValueError(f"{key}: {state[key]!r}: must be an integer of at least 0")
            for key, kinds in _STATE_KINDS.items():
                if not isinstance(state.get(key, kinds[0]()), kinds):
                    raise ValueError(f"{key}: {state[key]!r}: must be {kinds[0].__name__}")
            if not isinstance(model, dict):
                raise ValueError("model: must be a Hugging Face config")
        except Exception as error:  # malformed JSON values can raise anything
            raise CheckpointError(
                f"{folder}: is not a checkpoint of format {state['format']}: {str(error)[:200]}"
            ) from error
        _check_sizes(folder, index, part, parts)
        return cls(folder, state, model, index)

    @property
    def names(self) -> list[str]:
        """Full names of the parameters."""
        prefix = f"{WEIGHT}/"
        return [name.removeprefix(prefix) for name in self.index.entries if name.startswith(prefix)]

    @property
    def has_moments(self) -> bool:
        """Whether the checkpoint includes the optimizer's state."""
        return bool(self.moments)

    @property
    def moments(self) -> set[str]:
        """Names of the optimizer's state tensors, such as exp_avg."""
        return {name.partition("/")[0] for name in self.index.entries} - {WEIGHT}

    def shape(self, name: str, kind: str = WEIGHT) -> tuple[int, ...]:
        """Full shape of a parameter. Raises CheckpointError if it is not in the checkpoint."""
        return self._entry(name, kind).shape

    def read(
        self,
        name: str,
        offsets: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        kind: str = WEIGHT,
    ) -> Tensor:
        """A parameter, or its box at `offsets` of `shape`, as stored (fp32 masters)."""
        entry = self._entry(name, kind)
        offsets = tuple(offsets) if offsets is not None else (0,) * len(entry.shape)
        shape = tuple(shape) if shape is not None else entry.shape
        result = torch.empty(shape, dtype=entry.dtype)
        self.read_into(result, name, offsets, kind)
        return result

    def read_into(self, target: Tensor, name: str, offsets: Sequence[int], kind: str) -> None:
        """Fills `target` with the box at `offsets` that has the shape of `target`."""
        entry, offsets = self._entry(name, kind), tuple(offsets)
        rows = range(offsets[0], offsets[0] + len(target)) if offsets else None
        chunks = self.index.chunks(f"{kind}/{name}", rows)
        for chunk, ours, theirs in _overlaps(chunks, offsets, tuple(target.shape)):
            self.files.read_into(target[ours], chunk, entry, theirs)

    def _entry(self, name: str, kind: str) -> Entry:
        entry = self.index.entries.get(f"{kind}/{name}")
        if entry is None:
            raise CheckpointError(f"{self.folder}: {kind}/{name}: no such tensor in the checkpoint")
        return entry


def _overlaps(
    chunks: Iterable[StoredBox], offsets: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[StoredBox, tuple[slice, ...], tuple[slice, ...]]]:
    """Stored boxes that overlap a requested one: (box, the overlap in the requested one, the overlap in the stored
    one)."""
    for chunk in chunks:
        starts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        wanted_ends = [a + n for a, n in zip(offsets, shape, strict=True)]
        stored_ends = [a + n for a, n in zip(chunk.offsets, chunk.shape, strict=True)]
        stops = [min(a, b) for a, b in zip(wanted_ends, stored_ends, strict=True)]
        if all(a < b for a, b in zip(starts, stops, strict=True)):
            ours = _slices(starts, stops, offsets)
            yield chunk, ours, _slices(starts, stops, chunk.offsets)


def _slices(
    starts: Iterable[int], stops: Iterable[int], offsets: Iterable[int]
) -> tuple[slice, ...]:
    """A range of the full tensor as slices of a box that begins at `offsets`."""
    ends = zip(starts, stops, offsets, strict=True)
    return tuple(slice(start - first, stop - first) for start, stop, first in ends)


class CheckpointWriter:
    """Writes a checkpoint of weights from one process, tensor by tensor; the folder appears complete at the end of
    the `with` block, or not at all. At most FILE_BYTES and one tensor are held in memory.

    Raises CheckpointError if the folder already exists.
    """

    def __init__(self, folder: str | Path, model: dict[str, Any], state: dict[str, Any]) -> None:
        folder = Path(folder)
        if folder.exists():
            raise CheckpointError(f"{folder}: already exists; choose a new folder")
        self.carried: dict[str, bytes] = {}
        self.transaction = Transaction(folder, {**state, "model": model}, self.carried)
        self.index, self.digests = Index(), {}
        self.pending: dict[str, Tensor] = {}
        self.written = 0

    def __enter__(self) -> "CheckpointWriter":
        self.transaction.begin()
        return self

    def add(self, name: str, tensor: Tensor, kind: str = WEIGHT) -> None:
        """Adds a full tensor."""
        full_name, shape = f"{kind}/{name}", tuple(tensor.shape)
        held = sum(pending.nbytes for pending in self.pending.values())
        if self.pending and held + tensor.nbytes > FILE_BYTES:
            self._flush()
        chunk = StoredBox((0,) * len(shape), shape, self._file_name, full_name)
        self.index.add(full_name, Entry(shape, tensor.dtype), chunk)
        self.pending[full_name] = tensor

    def carry(self, path: Path) -> None:
        """Adds a small file that accompanies the weights, to `hugging_face/`."""
        self.carried[path.name] = path.read_bytes()

    @property
    def _file_name(self) -> str:
        return f"tensors_{self.written:05d}.safetensors"

    def _flush(self) -> None:
        name = self._file_name
        self.digests[name] = write_tensors(self.transaction.partial / name, self.pending)
        self.pending.clear()
        self.written += 1

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        if kind is not None:
            self.transaction.abandon()
            return
        try:
            if self.pending:
                self._flush()
            self.transaction.publish(self.index, self.digests)
        except BaseException:
            self.transaction.abandon()
            raise


def _check_sizes(folder: Path, index: Index, part: int, parts: int) -> None:
    """Raises CheckpointError if a file is too small for its boxes in the index: memory for them would otherwise be
    allocated before the read fails. part, parts: if each of 1,024 ranks looked up every rank's file, that would be a
    million requests to a shared file system."""
    for name, count in [*index.bytes_by_file().items()][part::parts]:
        path = folder / name
        if path.is_file() and (size := path.stat().st_size) < count:
            raise CheckpointError(
                f"{path}: cannot be read: has {size} bytes, but its boxes in {INDEX} need {count}"
            )


def size_bytes(index: Index) -> int:
    """Bytes of all tensors."""
    return sum(entry.dtype.itemsize * math.prod(entry.shape) for entry in index.entries.values())


def newest_named(run_dir: Path) -> str | None:
    """The name in `checkpoints/latest`; None if there is no such file."""
    path = run_dir / "checkpoints" / LATEST
    return path.read_text(errors="replace").strip() if path.exists() else None


def named_best(run_dir: Path) -> str | None:
    """The name in `checkpoints/best`; None if there is no such file or it names no checkpoint."""
    path = run_dir / "checkpoints" / BEST
    name = path.read_text(errors="replace").strip() if path.is_file() else ""
    return name if STEP_NAME.match(name) else None


def best_checkpoint(path: str | Path) -> Path:
    """The file that names the best checkpoint of a run folder, or of its `checkpoints` folder. Raises CheckpointError
    if the run does not keep one."""
    path = Path(path)
    run_dir = path.parent if path.name == "checkpoints" else path
    if named_best(run_dir) is None:
        rule = "must be a run with megalite.train.keep_best that has evaluated"
        raise CheckpointError(f"--best: {path}: has no checkpoints/{BEST}: {rule}")
    return run_dir / "checkpoints" / BEST
