"""What a run prints and sends, without ranks: the terminal, trackers, prompts, the split of a step."""

import errno
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console

from megalite.data.position import Position
from megalite.errors import ConfigError, TrainingError
from megalite.parallel.timeline import Span
from megalite.training import trackers as room_of_trackers
from megalite.training.groups import grouped
from megalite.training.loop import Run
from megalite.training.metrics import MetricsFile
from megalite.training.sampler import encoded_prompts
from megalite.training.screen import HEADER, Screen
from megalite.training.summary import Summary
from megalite.training.tracing import split
from megalite.training.trackers import Trackers, check_trackers
from megalite.training.watchers import Watcher
from tests.byte_model import save_byte_model, save_chatty_model


def row(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 2.34567, "grad_norm": 0.5341, "learning_rate": 1e-3, "step_seconds": 1.5,
        "tokens_per_second": 1_234_567.0, "mfu": 0.412, "tflops_per_rank": 0.4, "consumed_tokens": 100 * step, **fields,
    }  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_of_60_columns_shows_step_bar_and_memory(width: int) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, color_system=None)
    screen = Screen(1000, 0, 1, console)
    for step in range(1, 101):
        screen.after_step(row(step))
    first, second = (
        "".join(part.text for part in line).rstrip() for line in console.render_lines(screen)
    )
    screen.evaluated({"step": 100, "valid_loss": 1.5, "valid_perplexity": 4.48})
    screen.close()
    assert first.startswith("step 100/1000 ━━━━") and "left" in first and first.endswith("MFU 41 %")
    assert second.startswith("loss 2.3457  norm 0.534  lr 1.00e-03") and second.endswith("GiB")
    assert len(first) <= width and len(second) <= width
    text = written.getvalue()
    assert len(HEADER) <= 60 and text.count(HEADER) == 1 and "validation, perplexity 4.48" in text
    kept = [step for step in range(1, 101) if f"{step:>9}    2.3457" in text]
    assert kept == [1, 50, 100]


class Closed(io.StringIO):
    """A terminal that can be closed."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


def test_a_terminal_that_is_closed_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Closed()
    screen = Screen(9, 0, 1, Console(file=terminal, force_terminal=True, width=80))
    screen.after_step(row(1))
    terminal.gone = True
    screen.after_step(row(2))
    screen.evaluated({"step": 2, "valid_loss": 2.0, "valid_perplexity": 7.4})
    screen.logged("a word")
    screen.after_step(row(3))
    screen.close()
    said = capsys.readouterr().out
    assert "step 2  valid loss 2.0000" in said and "a word" in said and "step 3/9" in said


def test_a_skipped_step_stays_in_the_table() -> None:
    written = io.StringIO()
    screen = Screen(
        1000, 0, 1, Console(file=written, force_terminal=True, width=90, color_system=None)
    )
    for step in (1, 2, 3):
        screen.after_step(row(step, **({"skipped": "overflow"} if step == 2 else {})))
    screen.close()
    assert "overflow: skipped" in written.getvalue()


def test_without_a_terminal_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(4, 0, 2)
    for step in (1, 2, 3, 4):
        screen.after_step(row(step))
    screen.evaluated(
        {
            "step": 4,
            "valid_loss": 1.5,
            "valid_perplexity": 4.48,
            "samples": [{"prompt": "a", "text": "b"}],
        }
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 2/4",
        "step 4/4",
        "sample: ab",
        "step 4",
    ]
    assert "loss 2.3457  norm 0.534  lr 1.00e-03  1,234,567 tokens/s  MFU 41 %" in lines[0]


def test_a_gpus_teraflops_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fast = row(4, tflops_per_rank=407.6)
    Screen(4, 0, 1).after_step(fast)
    assert "1,234,567 tokens/s  408 TFLOP/s  MFU 41 %" in capsys.readouterr().out
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    screen = Screen(4, 0, 1, console)
    screen.after_step(fast)
    _, second = ("".join(part.text for part in line) for line in console.render_lines(screen))
    screen.close()
    assert re.search(r"lr 1.00e-03  408 TFLOP/s  \d+\.\d\d GiB", second)


def test_the_time_left_is_that_of_the_remaining_steps(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(20, 0, 10)
    for step in range(1, 21):
        screen.after_step(row(step))
    ends = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["0:00:15 left", "0:00:00 left"]  # steps of 1.5 s


def test_a_run_prints_its_result_at_the_end(tmp_path: Path) -> None:
    told: list[str] = []
    metrics = MetricsFile(tmp_path, 0, False, told.append)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        metrics.write({"step": step, "valid_loss": loss, "valid_perplexity": 1.0})
    data: Any = SimpleNamespace(loss=None, tokenizer=None)
    summary = Summary(tmp_path, metrics, True, data, told.append)
    summary.before_step(Position(step=1, consumed_tokens=100))
    summary.ended(Position(step=3, consumed_tokens=1100), "done")
    assert told[0].startswith("done: step 3, 1,000 tokens in 0:00:00")
    assert told[1] == "best validation loss 2.0000 at step 2"
    assert str(tmp_path / "report.html") in told[2] and told[3].startswith("next: ")
    assert told[3].endswith(f'generate --checkpoint {tmp_path} --prompt "…"')
    told.clear()
    summary.ended(Position(step=3), "error: loss is nan")
    assert told == []
    metrics.rewound(Position(step=1))
    assert metrics.best is not None and metrics.best["step"] == 1


@pytest.mark.parametrize(
    ("save", "command"), [(save_chatty_model, "chat"), (save_byte_model, "generate")]
)
def test_a_run_on_conversations_suggests_a_chat(
    save: Callable[[Path], Path], command: str, tmp_path: Path
) -> None:
    told: list[str] = []
    data: Any = SimpleNamespace(loss="marked", tokenizer=str(save(tmp_path / "model")))
    metrics = MetricsFile(tmp_path, 0, False, told.append)
    Summary(tmp_path, metrics, True, data, told.append).ended(Position(step=3), "done")
    assert f" {command} --checkpoint {tmp_path}" in told[-1]


class Ended(Watcher):
    """Records why a run ended."""

    def __init__(self) -> None:
        self.reason = ""

    def ended(self, position: Position, reason: str) -> None:
        self.reason = reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("out of\n  memory " + "x" * 400), "error: RuntimeError: out of memory x"),
        (KeyError(), "error: KeyError"),
        (TrainingError("loss is nan"), "error: loss is nan"),
    ],
)
def test_any_error_that_ends_a_run_is_the_reason(error: Exception, reason: str) -> None:
    watcher, nothing = Ended(), mock.Mock()
    nothing._train.side_effect = error
    nothing.watchers = [watcher]
    with pytest.raises(type(error)):
        Run.train(nothing)
    assert nothing._finish_earlier.called == isinstance(error, TrainingError)
    assert watcher.reason.startswith(reason) and "\n" not in watcher.reason
    assert len(watcher.reason) <= len("error: RuntimeError: ") + 300


def test_a_save_in_progress_has_its_own_time_limit_when_the_run_fails() -> None:
    """Not the remaining time of the step."""
    run = mock.MagicMock()
    run.config.train.limits.checkpoint_seconds = 7.0
    run.checkpoints.finish.side_effect = dist.DistBackendError("a peer is gone")
    run.watchdog.watching.return_value.__exit__.return_value = False
    Run._finish_earlier(run)
    run.watchdog.watching.assert_called_once_with("the checkpoint before the fault", 7.0)


def test_figures_are_grouped() -> None:
    found = grouped(
        {"step": 1, "loss": 2.0, "valid_losses": {"a": 1.0}, "weights_bytes": [1, 3], "skipped": "x", "mfu": 0.5,
         "checkpoint_seconds": 1.0, "split_seconds": {"compute": 0.5}, "unix_seconds": 5.0, "grad_norm": None,
         "expert_imbalance": 1.5}
    )  # fmt: skip
    assert found == {
        "train/loss": 2.0, "valid/losses/a": 1.0, "memory/weights_bytes": 3.0, "speed/mfu": 0.5,
        "checkpoint/seconds": 1.0, "speed/split_seconds/compute": 0.5, "experts/expert_imbalance": 1.5,
    }  # fmt: skip


class Failing:
    """A tracker whose server stops responding."""

    name, requires_logging_directory, __module__ = "failing", False, "elsewhere"

    def __init__(self, run_name: str) -> None:
        self.seen: list[int] = []

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int) -> None:
        raise ConnectionError("no route to host")

    def finish(self) -> None:
        raise AssertionError("left out before")


def test_a_tracker_that_fails_is_dropped_and_the_run_continues(tmp_path: Path) -> None:
    told: list[str] = []
    with mock.patch.dict(LOGGER_TYPE_TO_CLASS, {"failing": Failing}):
        check_trackers(["failing"])
        trackers = Trackers(["failing"], tmp_path, {}, told.append)
        trackers.after_step(row(1))
        trackers.after_step(row(2))
        trackers.close()
    line = "megalite.train.trackers: failing: disabled for the rest of the run: ConnectionError: no route to host"
    assert told == [line]


class Stuck(Failing):
    """A tracker whose server does not respond at the end."""

    def finish(self) -> None:
        time.sleep(0.5)


def test_a_tracker_that_waits_at_the_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(room_of_trackers, "TOLD_SECONDS", 0.1)
    with mock.patch.dict(LOGGER_TYPE_TO_CLASS, {"stuck": Stuck}):
        Trackers(["stuck"], tmp_path, {}, told.append).close()
    (line,) = told
    assert line.startswith("megalite.train.trackers: stuck: has been finishing its run for 0.1 s; ")


def test_trackers_are_checked_before_a_run() -> None:
    with pytest.raises(
        ConfigError, match="megalite.train.trackers: wandbb: must be one of aim, .*wandb"
    ):
        check_trackers(["wandbb"])
    with (
        mock.patch("importlib.util.find_spec", lambda name: None),
        pytest.raises(ConfigError, match="pip install mlflow"),
    ):
        check_trackers(["mlflow"])


@pytest.mark.parametrize(
    "prompts, tokenizer, causal, said",
    [
        (["a"], False, True, "needs megalite.data.tokenizer"),
        (["a"], True, False, "an encoder: needs a decoder"),
        (
            ["a", "b" * 20],
            True,
            True,
            r"sample_prompts.1: 20 tokens .*sample_tokens 5: must be 1 to 24",
        ),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    tmp_path: Path, prompts: list[str], tokenizer: bool, causal: bool, said: str
) -> None:
    folder = str(save_byte_model(tmp_path)) if tokenizer else None
    config: Any = SimpleNamespace(
        train=SimpleNamespace(sample_prompts=prompts, sample_tokens=5),
        data=SimpleNamespace(tokenizer=folder, sequence_length=24),
    )
    spec: Any = SimpleNamespace(causal=causal, family="bert", vocabulary_size=131, labels=())
    with pytest.raises(ConfigError, match=said):
        encoded_prompts(config, spec)


def test_a_step_is_split_up_without_counting_twice() -> None:
    spans = [
        Span("collective", ("all_reduce", "tensor"), "action", 1.0, 1.5),
        Span("action", "F", "", 0.0, 2.0),
        Span("receive", "value", "", 2.0, 3.0),
        Span("collective", ("all_reduce", "world"), "update", 3.5, 3.75),
        Span("update", "update", "", 3.0, 4.0),
        Span("send", "value", "", 4.0, 4.5),
    ]
    assert split(spans, {"step_seconds": 6.0, "checkpoint_seconds": 0.5}) == {
        "compute": 1.5, "wait tensor": 0.5, "wait pipe": 1.0, "wait world": 0.25, "update": 0.75,
        "checkpoint": 0.5, "other": 1.5,
    }  # fmt: skip


def test_rows_of_texts_are_json(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0, False, print)
    sample = {"prompt": "ä", "text": "\n"}
    metrics.evaluated({"step": 2, "samples": [sample]})
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 2, "samples": [sample]}
