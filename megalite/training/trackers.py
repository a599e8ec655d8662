"""Trackers by name, through accelerate.tracking: wandb, trackio, mlflow and others; also classes that a program of
yours has registered there (`register_tracker_class`). Rank 0 only.

Offline unless the environment says otherwise: wandb is in its mode `offline`, mlflow and trackio write into the run
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
TOLD_SECONDS = 15.0  # that a tracker may take to end its run before a line says so
OFFLINE = {  # variables that are set where they are not: {run} is the run folder
    "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": "{run}"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///{run}/mlflow.db"},
    "trackio": {"TRACKIO_DIR": "{run}/trackio"},
}


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError where a name is unknown or its package is not installed."""
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
    """Sends each row to each tracker. One that fails is left out from there on, and the run continues."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        config: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        """config: the resolved JSON, which trackers show by dotted keys."""
        self.tell = tell
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
        """Ends each tracker's run. One whose server is away may wait for it as long as it likes: then a line says so.
        In this thread: mlflow keeps the active run by thread."""
        for name, tracker in [*self.trackers.items()]:
            told = f"{KEY}: {name}: has been ending its run for {TOLD_SECONDS:g} s"
            waits = threading.Timer(
                TOLD_SECONDS, self.tell, [f"{told}; all else is done, the process may be killed"]
            )
            waits.daemon = True
            waits.start()
            self._try(name, tracker.finish)
            waits.cancel()

    def _log(self, row: Row, texts: dict[str, str] | None = None) -> None:
        values = grouped(row) | (texts or {})
        for name, tracker in [*self.trackers.items()]:
            self._try(name, lambda tracker=tracker: tracker.log(values, step=row["step"]))

    def _start(self, name: str, run_dir: Path, config: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for variable, value in OFFLINE.get(name, {}).items():
            os.environ.setdefault(variable, value.format(run=run_dir.resolve()))
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        place = (run_dir / "trackers",) if kind.requires_logging_directory else ()
        tracker = kind(run_dir.resolve().name, *place)
        tracker.main_process_only = False  # else accelerate takes the ranks into its own hands
        tracker.start()
        tracker.store_init_configuration(dict(_flat(config)))
        self.trackers[name] = tracker

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Whatever a tracker raises, a server that is away among it, must not end the run."""
        try:
            call()
        except Exception as error:
            self.trackers.pop(name, None)
            self.tell(f"{KEY}: {name}: left out from here on: {type(error).__name__}: {error}")


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted keys; lists as text, which is what trackers take."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else name)
    else:
        yield key, str(value) if isinstance(value, list) else value
