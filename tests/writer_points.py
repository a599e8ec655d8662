"""The file-system operations of a checkpoint's writer, one by one: for tests that kill it or refuse it at each."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # of Python's own audit
_CALLS = ("write", "fsync", "fdatasync")


def watch_writer(act: Callable[[int, str, Any], None]) -> None:
    """From here on calls act(number from 0, operation, its first argument) before each operation of this process's
    checkpoint thread. It may raise in its place, or kill. For a process that ends with its test: hooks stay."""
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
        # A first save also opens what libraries import late.
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
    """kill -9 of these processes before that operation."""

    def act(number: int, operation: str, argument: Any) -> None:
        if number == point:
            for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    return act
