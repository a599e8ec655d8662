"""safetensors files written one tensor at a time, so that a file may be larger than memory."""

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


@dataclass
class Shard:
    """One file: its tensors in order, each with its shape; dtype of all of them."""

    dtype: torch.dtype
    file: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def header(self) -> bytes:
        """The file's first bytes, its length included."""
        tensors = ((name, self.dtype, shape) for name, shape in self.shapes.items())
        return header_of(tensors, {"format": "pt"})


def plan_shards(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, most_bytes: int
) -> list[Shard]:
    """Tensors in order into files of at most `most_bytes` each, or of one tensor that is larger."""
    shards = [Shard(dtype)]
    for name, shape in shapes.items():
        if (
            shards[-1].shapes
            and shards[-1].data_bytes + math.prod(shape) * dtype.itemsize > most_bytes
        ):
            shards.append(Shard(dtype))
        shards[-1].shapes[name] = shape
    for number, shard in enumerate(shards):
        shard.file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
    if len(shards) == 1:
        shards[0].file = "model.safetensors"
    return shards


def write_shards(folder: Path, shards: list[Shard], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes the planned files; `tensors` come in the planned order."""
    coming = iter(tensors)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header())
            for wanted, shape in shard.shapes.items():
                name, tensor = next(coming)
                assert (name, tuple(tensor.shape), tensor.dtype) == (wanted, shape, shard.dtype), (
                    name,
                    wanted,
                )
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Says which file holds what, where there is more than one."""
    if len(shards) > 1:
        where = {name: shard.file for shard in shards for name in shard.shapes}
        index = {
            "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
            "weight_map": where,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
