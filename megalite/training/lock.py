"""Only one start at a time may use a run folder: the file `lock` names the process that holds it, rank 0 of the start.

On the same machine, that process and its start time are checked, since process ids are reused. From another machine,
only a heartbeat can be seen: a holder touches its file every BEAT_SECONDS, and one that has not done so for
PATIENCE_SECONDS is considered gone. A restart by launcher/run.py and a requeued Slurm job take over the lock of the
previous start at once. A holder that was considered gone and wakes up finds another's file, and exits.
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
from megalite.ranks.run_program import print_line
from megalite.ranks.signals import LAUNCH, at_the_end, leave_word

FILE = "lock"
BEAT_SECONDS, PATIENCE_SECONDS, POLL_SECONDS = 5.0, 60.0, 0.2
TAKEN_CODE = 1
_KEY = "megalite.train.run_dir"


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, and the launcher's run that started it."""

    folder: str
    """The run folder."""
    since: str
    host: str
    boot: str
    """Boot id of the host's kernel. With `processes`, the container's pid namespace, it tells where `pid` is valid."""
    processes: str
    pid: int
    born: int
    """Start time of the process in ticks since boot."""
    run: str
    """Id of the run of launcher/run.py or Slurm, whose successive starts differ in `start`; empty if there is
    neither."""
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
        """Parses the text of a lock file; None if it is incomplete, because it is still being written."""
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
        """Whether both share one pid namespace."""
        return (self.host, self.boot, self.processes) == (other.host, other.boot, other.processes)

    def is_there(self, run_dir: Path) -> bool:
        """For a near holder: whether its process is alive and holds this folder, not one of which this is a copy."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's process, which /proc may hide
            return True
        copied = Path(self.folder).exists() and not os.path.samefile(self.folder, run_dir)
        return _birth(self.pid) == self.born and not copied

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def take_lock(run_dir: Path) -> None:
    """Locks the run folder for this process until it exits. Raises ConfigError if another start holds it."""
    lock = _Lock(run_dir / FILE, Holder.this(run_dir))
    while not lock.create():
        if (text := _text_of_one_gone(lock)) is not None:
            lock.take_away(text)
    at_the_end(lock.release)
    atexit.register(lock.release)
    threading.Thread(target=lock.keep, name="lock", daemon=True).start()


class _Lock:
    """The lock file of one holder. It is changed under the mutex, so that the thread that keeps it cannot create it
    again after the release."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder, self.text = (
            path,
            holder,
            json.dumps(asdict(holder), indent=1) + "\n",
        )
        self.mutex, self.released = threading.Lock(), False

    def create(self) -> bool:
        """Creates the file. Returns False if it already exists."""
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
        """Removes the file of a holder that is gone, if it still has this text."""
        aside = self.path.with_name(f".{FILE}.{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
            # Another start may have been faster, so that this is its file.
            if aside.read_text(errors="replace") != text:
                with contextlib.suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink()
        except FileNotFoundError:  # another start has removed it at the same time
            return
        except OSError as error:
            raise _unusable(self.path, error) from error

    def release(self) -> None:
        """Removes the file, only in the holder's process: forked processes run the same exit handlers."""
        with self.mutex, contextlib.suppress(OSError):
            if (
                not self.released
                and os.getpid() == self.holder.pid
                and self.path.read_text(errors="replace") == self.text
            ):
                self.path.unlink()
            self.released = True

    def keep(self) -> None:
        """Sends heartbeats until the release, or until another start holds the file: then this process exits at
        once."""
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
                f"{_KEY}: {self.path.parent}: taken over by {Holder.read(text)}: this start exits"
            )
        )
        sys.stderr.flush()
        leave_word(TAKEN_CODE)
        os._exit(TAKEN_CODE)


def _text_of_one_gone(lock: _Lock) -> str | None:
    """The text of the file once its holder is gone; None if there is another file now, or none. Raises ConfigError if
    the holder is alive."""
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
    line = f"{lock.path}: held by {holder or 'another start'}: waiting up to {PATIENCE_SECONDS:.0f} s for a heartbeat"
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
    """The file's text and modification time; None if it is gone. It is opened each time, so that a shared file system
    asks its server."""
    try:
        with path.open(errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error


def _birth(pid: int) -> int | None:
    """Ticks since boot at which a process started; None if it is gone or a zombie."""
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
