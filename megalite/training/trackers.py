"""Trackers by name, through accelerate.tracking: wandb, trackio, mlflow and others; also classes that your program
has registered there (`register_tracker_class`). Rank 0 only.

Offline unless the environment says otherwise: wandb runs in mode `offline`, mlflow and trackio write into the run
folder.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError
from megalite.training.groups import grouped
from megalite.training.watchers import Row, Watcher

KEY = "megalite.train.trackers"
TOLD_SECONDS = 15.0  # after this, a line says that a tracker is still finishing its run
OFFLINE = {  # variables that are set if they are not; {run} is the run folder
    "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": "{run}"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///{run}/mlflow.db"},
    "trackio": {"TRACKIO_DIR": "{run}/trackio"},
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError if a name is unknown or its package is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # takes a second

    for name in names:
        known = LOGGER_TYPE_TO_CLASS.get(name)
        if known is None:
            choices = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"{KEY}: {name}: must be one of {choices}")
        of_accelerate = known.__module__ == "accelerate.tracking"
        if of_accelerate and importlib.util.find_spec(name) is None:
            raise ConfigError(f"{KEY}: {name}: is not installed: pip install {name}")


class Trackers(Watcher):
    """Sends each row to each tracker. One that fails is disabled, and the run continues."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        config: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:
        """config: the resolved JSON, which trackers show by dotted keys."""
        self.log = log
        self.trackers: dict[str, Any] = {}
        for name in names:
            self._try(name, lambda name=name: self._start(name, run_dir, config))

    def after_step(self, row: Row) -> None:
        """Logs the row."""
        self._log(row)

    def evaluated(self, row: Row) -> None:
        """Logs the row, and samples as text."""
        texts = {
            f"valid/sample_{number}": f"{sample['prompt']}{sample['text']}"
            for number, sample in enumerate(row.get("samples", []))
        }
        self._log(row, texts)

    def close(self) -> None:
        """Ends each tracker's run. A tracker may wait for an unreachable server indefinitely; a line then says so. This
        must run in the main thread: mlflow's active run is per thread."""
        for name, tracker in [*self.trackers.items()]:
            line = f"{KEY}: {name}: has been finishing its run for {TOLD_SECONDS:g} s"
            timer = threading.Timer(
                TOLD_SECONDS,
                self.log,
                [f"{line}; everything else is done, the process may be killed"],
            )
            timer.daemon = True
            timer.start()
            self._try(name, tracker.finish)
            timer.cancel()

    def _log(self, row: Row, texts: dict[str, str] | None = None) -> None:
        values = grouped(row) | (texts or {})
        for name, tracker in [*self.trackers.items()]:
            self._try(name, lambda tracker=tracker: tracker.log(values, step=row["step"]))

    def _start(self, name: str, run_dir: Path, config: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for variable, value in OFFLINE.get(name, {}).items():
            os.environ.setdefault(variable, value.format(run=run_dir.resolve()))
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        logging_dir = (run_dir / "trackers",) if kind.requires_logging_directory else ()
        tracker = kind(run_dir.resolve().name, *logging_dir)
        tracker.main_process_only = False  # otherwise accelerate sets up its own process state
        tracker.start()
        tracker.store_init_configuration(dict(_flat(config)))
        self.trackers[name] = tracker

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """No error of a tracker, such as an unreachable server, may end the run."""
        try:
            call()
        except Exception as error:
            self.trackers.pop(name, None)
            self.log(
                f"{KEY}: {name}: disabled for the rest of the run: {type(error).__name__}: {error}"
            )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted keys; lists as text, since trackers do not take lists."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else name)
    else:
        yield key, str(value) if isinstance(value, list) else value
