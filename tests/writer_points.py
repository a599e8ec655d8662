"""The file-system operations of a checkpoint's writer, one by one, for tests that kill it or raise an error at each."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # Python's audit events
_CALLS = ("write", "fsync", "fdatasync")


def watch_writer(act: Callable[[int, str, Any], None]) -> None:
    """From now on calls act(number from 0, operation, its first argument) before each operation of this process's
    checkpoint thread. `act` may raise instead, or kill. For a process that ends with its test, since hooks stay."""
    count, inside = 0, threading.local()

    def before(operation: str, argument: Any) -> None:
        nonlocal count
        if not threading.current_thread().name.startswith("checkpoint") or getattr(
            inside, "here", False
        ):
            return
        inside.here = True
        try:
            count += 1
            act(count - 1, operation, argument)
        finally:
            inside.here = False

    def audited(event: str, arguments: Any) -> None:
        # A first save also opens files that libraries import late.
        if event in _EVENTS and (event != "open" or "checkpoints" in str(arguments[0])):
            before(event, arguments[0])

    def called(name: str) -> Any:
        whole = getattr(os, name)

        def call(descriptor: int, *rest: Any) -> Any:
            before(name, descriptor)
            return whole(descriptor, *rest)

        return call

    for name in _CALLS:
        setattr(os, name, called(name))
    sys.addaudithook(audited)


def kill_at(point: int, pids: list[int]) -> Callable[[int, str, Any], None]:
    """An `act` that kills these processes with SIGKILL before operation `point`."""

    def act(number: int, operation: str, argument: Any) -> None:
        if number == point:
            for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    return act
