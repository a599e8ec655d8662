"""Finds races between streams on a CPU that DeepSpeed takes for a device with streams (tests/streams.py).

Each operation of torch belongs to the stream that is current. Two operations on the same bytes, one of which writes
them, must be ordered: the later one's stream must have waited, directly or not, for the earlier one (vector clocks:
Fidge 1988, Mattern 1989). The same holds for memory that is freed. The allocator gives it to the next tensor of the
stream that allocated it, which must by then have waited for all others that used it, unless `record_stream` told the
allocator.

The messages of a process group have a stream of their own, as under NCCL: it waits for the stream that is current when
a collective is called, and the stream in which `wait` is called waits for it. Without async_op torch calls `wait`.
"""

import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import ScriptObject, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.streams import Stream, Streams

UNWRITTEN = (
    "aten.empty",
    "aten.empty_like",
    "aten.new_empty",
    "aten.empty_strided",
    "aten.new_empty_strided",
)


@dataclass(frozen=True)
class Use:
    """Bytes [first, stop) of a storage, used by operation number `at` of a stream."""

    first: int
    stop: int
    writes: bool
    stream: Stream
    at: int
    what: str


@dataclass
class Memory:
    """A storage. owner: the stream that allocated it. told: streams of `record_stream`."""

    owner: Stream
    uses: list[Use] = field(default_factory=list)
    told: set[Stream] = field(default_factory=set)


class Races(TorchDispatchMode):
    """Inside, `found` lists every race in words. streams: those of `like_a_gpu`."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams, self.found = streams, Counter[str]()
        self.memories: dict[int, Memory] = {}
        self.freed: list[tuple[Stream, Use]] = []  # uses of freed memory by others than its owner
        self.groups: dict[str, Stream] = {}
        self.works: dict[int, tuple[Any, Counter[Any], Any]] = {}
        """Of each collective that was not waited for: its handle, what is complete when it is, and its tensors, which
        ProcessGroupNCCL keeps until then, too."""
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "Races":
        wait = dist.Work.wait

        def waited(work: Any, *args: Any) -> Any:
            _, past, _ = self.works.pop(id(work), (None, Counter[Any](), ()))
            self.streams.current.past |= past
            return wait(work, *args)

        self.patches.enter_context(mock.patch.object(dist.Work, "wait", waited))
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self.patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func.overloadpacket)
        result = func(*args, **kwargs)
        schema = func._schema
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return result  # a view, which touches no number
        stream, what = self.streams.current, name.partition(".")[2]
        stream.past |= self.streams.host
        if func.namespace == "c10d":
            stream = self._stream_of_group(args, stream)
        stream.past[stream] += 1
        given = [(a, args[i]) for i, a in enumerate(schema.arguments) if i < len(args)]
        given += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
        for place, (argument, value) in enumerate(given):
            first = func.namespace == "c10d" and place == 0
            writes = first or (argument.alias_info is not None and argument.alias_info.is_write)
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    self._use(tensor, writes, what, stream)
        if func.namespace == "c10d":
            self._keep_work(result, stream, args)
        if func.namespace != "c10d" and name not in UNWRITTEN:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._use(tensor, True, what, stream)
        return result

    def _stream_of_group(self, args: Any, current: Stream) -> Stream:
        """The stream of the collective's group, which now waits for the current one."""
        groups = (
            x for x in args if isinstance(x, ScriptObject) and "ProcessGroup" in str(x._type())
        )
        name = dist.ProcessGroup.unbox(next(groups)).group_name
        stream = self.groups.setdefault(name, Stream(self.streams))
        stream.past |= current.past
        return stream

    def _keep_work(self, result: Any, stream: Stream, args: Any) -> None:
        boxed = result[-1] if isinstance(result, tuple | list) else result
        # The same Python object as the one that the caller gets, as long as this one exists.
        work = dist.Work.unbox(boxed)
        self.works[id(work)] = work, Counter(stream.past), args

    def told(self, tensor: Tensor, stream: Stream) -> None:
        """`record_stream`."""
        self._memory(tensor).told.add(stream)

    def _memory(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.memories:
            self._allocate(self.streams.current)
            self.memories[key] = Memory(self.streams.current)
            weakref.finalize(storage, self._free, key)
        return self.memories[key]

    def _free(self, key: int) -> None:
        memory = self.memories.pop(key)
        # The allocator records an event on each stream that it was told of.
        safe = [memory.owner.past, *(stream.past for stream in memory.told)]
        self.freed += [
            (memory.owner, use)
            for use in memory.uses
            if not any(past[use.stream] >= use.at for past in safe)
        ]

    def _allocate(self, stream: Stream) -> None:
        for owner, use in self.freed:
            if owner is stream and stream.past[use.stream] < use.at:
                self.found[f"freed while another stream may still be in {use.what}"] += 1
        self.freed = [(owner, use) for owner, use in self.freed if owner is not stream]

    def _use(self, tensor: Tensor, writes: bool, what: str, stream: Stream) -> None:
        if not tensor.numel() or tensor.is_meta:
            return
        memory = self._memory(tensor)
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        first = tensor.storage_offset() * tensor.itemsize
        use = Use(
            first, first + extent * tensor.itemsize, writes, stream, stream.past[stream], what
        )
        kept = []
        for other in memory.uses:
            overlaps = other.first < use.stop and use.first < other.stop
            ordered = stream.past[other.stream] >= other.at
            if overlaps and (writes or other.writes) and not ordered:
                self.found[f"{what} while another stream may still be in {other.what}"] += 1
            inside = use.first <= other.first and other.stop <= use.stop
            if not (inside and ordered and (writes or not other.writes)):
                kept.append(other)
        memory.uses = [*kept, use]
