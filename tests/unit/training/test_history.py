"""history.jsonl and the page that a run writes at its end (megalite/training/history.py)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalite.data.loader import Share
from megalite.data.position import Position
from megalite.report.read import ABOUT, HISTORY, REPORT
from megalite.training import history
from megalite.training.history import History, ReportWriter


class Data:
    """Two corpora from which samples are taken alternately."""

    def shares(self, samples: int) -> list[Share]:
        return [Share("a", 0.5, (samples + 1) // 2), Share("b", 0.5, samples // 2)]


def test_each_event_is_a_line_with_its_step(tmp_path: Path) -> None:
    data: Any = Data()
    made = History(tmp_path, data, print)
    made.started(Position(), "pipe 2 × data 1", 12.5)
    made.saved(Position(3, 24))
    made.rewound(Position(2, 16))
    made.ended(Position(5, 41), "done")
    made.close()
    rows = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    told = [(row["event"], row["step"]) for row in rows]
    assert told == [("start", 0), ("checkpoint", 3), ("back", 2), ("end", 5)]
    assert (rows[0]["grid"], rows[0]["last_seen"]) == ("pipe 2 × data 1", 12.5)
    assert [corpus["samples"] for corpus in rows[1]["corpora"]] == [12, 12]
    assert rows[3]["corpora"][0] == {"path": "a", "asked": 0.5, "samples": 21}
    assert rows[3]["reason"] == "done" and all(row["unix_seconds"] > 0 for row in rows)


def test_a_page_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    made = ReportWriter(tmp_path, {"model": "llama"}, told.append)
    assert json.loads((tmp_path / ABOUT).read_text()) == {"model": "llama"} and told == []

    def broken(folders: Any, path: Path) -> None:
        raise KeyError("loss")

    monkeypatch.setattr(history, "write_report", broken)
    made.close()
    assert told == [f"{tmp_path / REPORT}: cannot be written: KeyError: 'loss'"]


def test_a_full_disk_at_the_start_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history, "write_durably", full)
    told: list[str] = []
    ReportWriter(tmp_path, {}, told.append)
    line = f"{tmp_path / ABOUT}: cannot be written: No space left on device; the run continues"
    assert told == [line]


def test_the_page_is_written_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(calls=[])
    monkeypatch.setattr(history, "write_report", lambda *given: made.calls.append(given))
    ReportWriter(tmp_path, {}, pytest.fail).close()
    assert made.calls == [([tmp_path], tmp_path / REPORT)]
