"""One start at a time in a run folder: the file `lock` names the process that has it, rank 0's of the start.

On the same machine that process is looked at, and when it was born, since numbers of processes come again. From another
machine only a sign of life can be seen: a holder touches its file every BEAT_SECONDS, and one that has not done so for
PATIENCE_SECONDS is gone. A start of launcher/run.py, and a requeued job of Slurm, takes the lock of the one before it
at once. A holder that was thought gone and wakes up finds another's file, and ends.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megalite.errors import ConfigError
from megalite.ranks.program import print_line
from megalite.ranks.signals import LAUNCH, at_the_end, leave_word

FILE = "lock"
BEAT_SECONDS, PATIENCE_SECONDS, POLL_SECONDS = 5.0, 60.0, 0.2
TAKEN_CODE = 1
_KEY = "megalite.train.run_dir"


@dataclass(frozen=True)
class Holder:
    """A process, and the launcher's run that its start is one of."""

    folder: str
    """Of the run."""
    since: str
    host: str
    boot: str
    """Of the host's kernel, another one each time; with `processes`, a container's own, says what `pid` counts in."""
    processes: str
    pid: int
    born: int
    """In ticks since the boot."""
    run: str
    """Of launcher/run.py or Slurm, whose starts follow one another, each told by `start`; empty where it is neither."""
    start: str

    @classmethod
    def this(cls, run_dir: Path) -> "Holder":
        """This process."""
        environment = os.environ
        run, _, start = environment.get(LAUNCH, "").rpartition("-")
        if not run and "SLURM_JOB_ID" in environment:
            run, start = (
                f"slurm {environment['SLURM_JOB_ID']}",
                environment.get("SLURM_RESTART_COUNT", "0"),
            )
        boot = processes = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            processes = os.readlink("/proc/self/ns/pid")
        return cls(
            folder=str(run_dir.resolve()), since=time.strftime("%Y-%m-%d %H:%M:%S"), host=socket.gethostname(),
            boot=boot, processes=processes, pid=os.getpid(), born=_birth(os.getpid()) or 0, run=run, start=start,
        )  # fmt: skip

    @classmethod
    def read(cls, text: str) -> "Holder | None":
        """None where the text is not whole: its writer has just begun."""
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        return (
            holder
            if isinstance(holder.pid, int) and holder.pid > 0 and isinstance(holder.folder, str)
            else None
        )

    def is_before(self, other: "Holder") -> bool:
        """Whether `other` is a later start of the same launcher's run."""
        return self.run == other.run != "" and self.start != other.start

    def is_near(self, other: "Holder") -> bool:
        """Whether both have one table of processes."""
        return (self.host, self.boot, self.processes) == (other.host, other.boot, other.processes)

    def is_there(self, run_dir: Path) -> bool:
        """Of one that is near: whether its process still has this folder, and not one that this is a copy of."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, which /proc may not show
            return True
        copied = Path(self.folder).exists() and not os.path.samefile(self.folder, run_dir)
        return _birth(self.pid) == self.born and not copied

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def take_lock(run_dir: Path) -> None:
    """Takes the run folder for this process until its end. ConfigError where another start has it."""
    lock = _Lock(run_dir / FILE, Holder.this(run_dir))
    while not lock.create():
        if (text := _text_of_one_gone(lock)) is not None:
            lock.take_away(text)
    at_the_end(lock.release)
    atexit.register(lock.release)
    threading.Thread(target=lock.keep, name="lock", daemon=True).start()


class _Lock:
    """The file of one holder. It is changed under the mutex: the thread that keeps it must not make it again once it
    has been released."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder, self.text = (
            path,
            holder,
            json.dumps(asdict(holder), indent=1) + "\n",
        )
        self.mutex, self.released = threading.Lock(), False

    def create(self) -> bool:
        """Makes the file; whether there was none."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            os.write(descriptor, self.text.encode())
            os.fsync(descriptor)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise _unusable(self.path, error) from error
        finally:
            os.close(descriptor)
        return True

    def take_away(self, text: str) -> None:
        """Removes the file of a holder that is gone, by its text."""
        aside = self.path.with_name(f".{FILE}.{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
            if (
                aside.read_text(errors="replace") != text
            ):  # another start was quicker, and this is its file
                with contextlib.suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink()
        except FileNotFoundError:  # of several that do this at once one has it
            return
        except OSError as error:
            raise _unusable(self.path, error) from error

    def release(self) -> None:
        """By the holder alone: a process forked from it has the same last acts."""
        with self.mutex, contextlib.suppress(OSError):
            if (
                not self.released
                and os.getpid() == self.holder.pid
                and self.path.read_text(errors="replace") == self.text
            ):
                self.path.unlink()
            self.released = True

    def keep(self) -> None:
        """Gives signs of life, until the release or until another has the file: then this process ends at once."""
        while True:
            time.sleep(BEAT_SECONDS)
            with self.mutex, contextlib.suppress(OSError, ConfigError):
                if self.released:
                    return
                if not self.path.exists() and self.create():
                    continue
                text = self.path.read_text(errors="replace")
                if text == self.text:
                    os.utime(self.path)
                    continue
                self.released = True
                break
        print_line(
            RuntimeError(
                f"{_KEY}: {self.path.parent}: {Holder.read(text)} has taken it over: this start ends"
            )
        )
        sys.stderr.flush()
        leave_word(TAKEN_CODE)
        os._exit(TAKEN_CODE)


def _text_of_one_gone(lock: _Lock) -> str | None:
    """The text of the file once its holder is gone; None where there is another file now, or none. ConfigError where
    the holder is there."""
    first = _look(lock.path)
    if first is None:
        return None
    holder = Holder.read(first[0])
    if holder is not None and holder.is_before(lock.holder):
        return first[0]
    if holder is not None and holder.is_near(lock.holder):
        if holder.is_there(lock.path.parent):
            raise _held(lock.path, holder)
        return first[0]
    line = f"{lock.path}: of {holder or 'another start'}: waiting up to {PATIENCE_SECONDS:.0f} s for a sign of life"
    print(line, file=sys.stderr, flush=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        seen = _look(lock.path)
        if seen is None or seen[0] != first[0]:
            return None
        if seen != first:
            raise _held(lock.path, holder)
    return first[0]


def _look(path: Path) -> tuple[str, int] | None:
    """Its text and time; None where it is gone. Opened each time: a shared file system then asks its server."""
    try:
        with path.open(errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error


def _birth(pid: int) -> int | None:
    """Ticks since the boot at which a process began; None where it is gone, or dead and waiting for its parent."""
    if not Path("/proc/self/stat").exists():
        return 0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZXx" else int(fields[19])


def _held(path: Path, holder: Holder | None) -> ConfigError:
    rule = (
        f"one start at a time: stop that one, choose another folder, or remove {path} if it is gone"
    )
    return ConfigError(f"{_KEY}: {path.parent}: in use by {holder or 'another start'}: {rule}")


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{_KEY}: {path.parent}: {path.name} cannot be used: {error.strerror}")
