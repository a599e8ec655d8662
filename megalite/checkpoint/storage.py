"""torch.distributed.checkpoint over safetensors files and a JSON index: boxes of tensors, no pickle in any file.

DCP plans who writes and who reads what and carries errors to every rank; its own storage pickles its index, and
its safetensors writer keeps one box of a tensor in a file, so planners and storage are ours. A state dict here is
`{name: [Box, …]}`. Next: files.py, what a checkpoint's folder holds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.folder import Chunk, Entry, Index, Transaction
from megalite.checkpoint.tensors_file import TensorFiles, write_tensors
from megalite.errors import CheckpointError

BoxDict = dict[str, list[Box]]
BOX_BYTES, OTHER_BYTES = (
    512,
    1 << 16,
)  # of a checkpoint beside its tensors: for each box, and in all


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class BoxSavePlanner(SavePlanner):
    """Plans to write every box once. Boxes of different ranks never overlap: each element has one owner."""

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self.boxes = {
            (name, box.offsets): box for name, boxes in state_dict.items() for box in boxes
        }

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(name, box) for (name, _), box in self.boxes.items()])

    def _item(self, name: str, box: Box) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(box.offsets), box.values.shape)
        properties = TensorProperties(dtype=box.values.dtype)
        data = TensorWriteData(chunk, properties, torch.Size(box.full_shape))
        return WriteItem(
            MetadataIndex(name, torch.Size(box.offsets)), WriteItemType.SHARD, tensor_data=data
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        return self.boxes[write_item.index.fqn, tuple(write_item.index.offset)].values


class BoxWriter(StorageWriter):
    """Writes a rank's boxes into one safetensors file of an unpublished folder; the coordinator publishes it.

    before, after: called on the coordinator, around it all; before is given the bytes that will be written.
    """

    def __init__(
        self, transaction: Transaction, before: Callable[[int], None], after: Callable[[], None]
    ) -> None:
        self.transaction, self.before, self.after = transaction, before, after

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.before(_planned_bytes(plans))
        self.transaction.begin()
        folder = (
            self.transaction.partial.name
        )  # the other ranks' transactions would call theirs otherwise
        names = [f"{folder}/tensors_{rank:05d}.safetensors" for rank in range(len(plans))]
        return [
            SavePlan(plan.items, storage_data=name) for plan, name in zip(plans, names, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:
            return _done([])
        tensors, results = {}, []
        path = self.transaction.folder.parent / plan.storage_data
        if not path.parent.is_dir():
            raise CheckpointError(
                f"{path.parent}: rank 0 made it: must lie on a file system that all ranks share"
            )
        for item in plan.items:
            assert item.tensor_data is not None
            box = item.tensor_data.chunk
            key = f"{item.index.fqn}@{','.join(map(str, box.offsets))}"
            values = planner.resolve_data(item)
            assert isinstance(values, Tensor)
            tensors[key] = values
            chunk = Chunk(tuple(box.offsets), tuple(box.sizes), path.name, key)
            results.append(WriteResult(item.index, values.nbytes, chunk))
        results[0].storage_data.digest = write_tensors(path, tensors)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index, digests = Index(), {}
        for result in (result for of_rank in results for result in of_rank):
            meta = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(meta, TensorStorageMetadata)
            chunk: Chunk = result.storage_data
            index.add(result.index.fqn, Entry(tuple(meta.size), meta.properties.dtype), chunk)
            if chunk.digest:
                digests[chunk.file] = chunk.digest
        self.transaction.publish(index, digests)
        self.after()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _planned_bytes(plans: list[SavePlan]) -> int:
    """Of the tensors, and about those of the JSON that names each box."""
    total = OTHER_BYTES
    for item in (item for plan in plans for item in plan.items):
        assert item.tensor_data is not None
        data = item.tensor_data
        total += data.chunk.sizes.numel() * data.properties.dtype.itemsize + BOX_BYTES
    return total


class BoxLoadPlanner(LoadPlanner):
    """Plans to read, for every box wanted, the parts of stored boxes that it overlaps."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.boxes = {
            (name, box.offsets): box for name, boxes in state_dict.items() for box in boxes
        }
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for (name, offsets), box in self.boxes.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"{name}: no such tensor in the checkpoint")
            if tuple(stored.size) != box.full_shape:
                raise CheckpointError(
                    f"{name}: shape {list(stored.size)} in the checkpoint, {list(box.full_shape)} "
                    "in the model: must be equal"
                )
            wanted = ChunkStorageMetadata(torch.Size(offsets), box.values.shape)
            found = create_read_items_for_chunk_list(name, stored, [wanted])
            if sum(item.lengths.numel() for item in found) != box.values.numel():
                raise CheckpointError(f"{name}: the boxes in the checkpoint do not make it whole")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.dest_index.offset is not None
        target = self.boxes[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)].values
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class BoxReader(StorageReader):
    """Reads parts of boxes from a published folder whose files have been checked."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [
                    ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape))
                    for c in entry.chunks
                ],
            )
            for name, entry in self.index.entries.items()
        }
        return Metadata(tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = TensorFiles(self.folder)
        for item in plan.items:
            name, offsets = item.storage_index.fqn, item.storage_index.offset
            assert offsets is not None
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            part = tuple(slice(a, a + n) for a, n in ends)
            chunk = self.index.chunk(name, tuple(offsets))
            files.read_into(planner.resolve_tensor(item), chunk, self.index.entries[name], part)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
