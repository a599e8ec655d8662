"""Makes DeepSpeed treat a CPU as a device with streams, so that it also does what it otherwise does only on GPUs."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator as CPUAccelerator


class Streams:
    """All streams of a process. host_waits: how often the host has waited, by kind. log: ("used", stream) after work
    was queued on another stream than the step's, and ("waits", stream, for which stream)."""

    def __init__(self) -> None:
        self.host_waits: Counter[str] = Counter()
        self.log: list[tuple[Any, ...]] = []
        self.host: Counter[Any] = Counter()  # what the host has waited for, as in Stream.past
        self.step = self.current = Stream(self)
        self.all = [self.step]

    @property
    def not_joined(self) -> list[Any]:
        """Streams with work that the step's stream has not waited for."""
        last: dict[Any, str] = {}
        for what, stream, *others in self.log:
            if what == "used":
                last[stream] = "used"
            elif stream is self.step:
                last[others[0]] = "joined"
        return [stream for stream, state in last.items() if state == "used"]

    @contextlib.contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
            if stream is not self.step:
                self.log.append(("used", stream))


class Stream:
    """past: for each stream, how many of its operations come before everything that is queued here from now on."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.past: Counter[Any] = Counter()

    def wait_stream(self, other: Any) -> None:
        assert other is not None
        self.streams.log.append(("waits", self, other))
        self.past |= other.past

    def wait_event(self, event: Any) -> None:
        self.streams.log.append(("waits", self, event.stream))
        self.past |= event.past

    def synchronize(self) -> None:
        self.streams.host_waits["stream"] += 1
        self.streams.log.append(("waits", self.streams.step, self))
        self.streams.host |= self.past


class Event:
    """An event of which the host never sees whether it is complete: `query` says that it is, and orders nothing."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.stream = streams, streams.current
        self.past: Counter[Any] = Counter()

    def record(self, stream: Any = None) -> None:
        self.stream = stream or self.streams.current
        self.past = Counter(self.stream.past)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.streams.host_waits["event"] += 1
        self.streams.host |= self.past


@contextlib.contextmanager
def like_a_gpu() -> Iterator[Streams]:
    """Inside, DeepSpeed builds and runs engines as on a GPU."""
    streams = Streams()

    def synchronize(self: Any, device_index: Any = None) -> None:
        streams.host_waits["device"] += 1
        for stream in streams.all:
            streams.host |= stream.past

    def made(*args: Any, **kwargs: Any) -> Stream:
        streams.all.append(Stream(streams))
        return streams.all[-1]

    answers = {
        "is_synchronized_device": lambda self: False,
        "synchronize": synchronize,
        "current_stream": lambda self, device_index=None: streams.current,
        "default_stream": lambda self, device_index=None: streams.step,
        "stream": lambda self, stream: streams.entered(stream),
        "Stream": property(lambda self: made),
        "Event": property(lambda self: lambda *args, **kwargs: Event(streams)),
    }
    with contextlib.ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(CPUAccelerator, name, answer))
        patches.enter_context(
            mock.patch.object(torch.Tensor, "record_stream", lambda self, stream: None)
        )
        yield streams
