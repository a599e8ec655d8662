"""Writes safetensors files one tensor at a time, so that a file may be larger than memory."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.tensors_file import header_of

INDEX = "model.safetensors.index.json"
Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


def bytes_of(form: Form) -> int:
    """Bytes of a tensor of that form."""
    shape, dtype = form
    return math.prod(shape) * dtype.itemsize


@dataclass
class FileShard:
    """One file: its tensors in order."""

    file: str = ""
    tensors: dict[str, Form] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        return sum(map(bytes_of, self.tensors.values()))

    def header(self) -> bytes:
        """The file's header, including its length."""
        tensors = ((name, dtype, shape) for name, (shape, dtype) in self.tensors.items())
        return header_of(tensors, {"format": "pt"})


def plan_shards(tensors: dict[str, Form], most_bytes: int) -> list[FileShard]:
    """Assigns tensors in order to files of at most `most_bytes`; a larger tensor gets its own file."""
    shards = [FileShard()]
    for name, form in tensors.items():
        if shards[-1].tensors and shards[-1].data_bytes + bytes_of(form) > most_bytes:
            shards.append(FileShard())
        shards[-1].tensors[name] = form
    for number, shard in enumerate(shards):
        shard.file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
    if len(shards) == 1:
        shards[0].file = "model.safetensors"
    return shards


def write_shards(
    folder: Path, shards: list[FileShard], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes the planned files. tensors: in the planned order."""
    remaining = iter(tensors)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header())
            for wanted, form in shard.tensors.items():
                name, tensor = next(remaining)
                assert (name, (tuple(tensor.shape), tensor.dtype)) == (wanted, form), (name, wanted)
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())


def write_index(folder: Path, shards: list[FileShard]) -> None:
    """Writes the index of the files' tensors, if there is more than one file."""
    if len(shards) > 1:
        where = {name: shard.file for shard in shards for name in shard.tensors}
        index = {
            "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
            "weight_map": where,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
