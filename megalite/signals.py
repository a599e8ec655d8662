"""Signals, and the death of whoever started this rank, as two flags that the training loop reads at a step's end.

Stock `deepspeed` leaves ranks running when its top process or its launcher dies: a rank watches both, and treats
the loss of either as SIGTERM. A thread listens, since the main one may be held up in a collective, where Python's
own handlers do not run.
"""

import functools
import os
import select
import signal
import socket
import threading
from pathlib import Path

POLL_SECONDS = 0.5
EXIT_BASE = 128  # a process that a signal ended exits with this and the signal's number


class Signals:
    """stop: the signal to end for (0: none); save: whether a checkpoint was asked for. Until `defer` a signal to stop
    ends the process at once: there is nothing to save. After the first one further ones are ignored."""

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self.deferred = False
        self.watched = ancestors()
        self.ears, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def defer(self) -> None:
        """From now on a signal to stop only sets `stop`."""
        self.deferred = True

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self.ears], [], [], POLL_SECONDS)
            for number in self.ears.recv(64) if ready else b"":
                if number == signal.SIGUSR1:
                    self.save = True
                else:
                    self._end_for(number)
            if not self.stop and ancestors() != self.watched:
                self._end_for(signal.SIGTERM)

    def _end_for(self, number: int) -> None:
        self.stop = self.stop or int(number)
        if not self.deferred:
            os._exit(EXIT_BASE + self.stop)


@functools.cache
def listen() -> Signals:
    """This process's listener, started at the first call, which is in the main thread."""
    return Signals()


def ancestors() -> tuple[int, ...]:
    """The parent, and where that is DeepSpeed's launcher its parent too, which is `deepspeed` or a remote shell.
    When one dies the kernel gives its children another parent, and this changes."""
    parent = os.getppid()
    return (parent, parent_of(parent)) if b"deepspeed.launcher.launch" in command_of(parent) else (parent,)


def command_of(pid: int) -> bytes:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    """A process's parent; 0 where it is gone."""
    try:
        # The name in the second field may hold blanks and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
