"""report.html: its content for run folders, also with missing or truncated files; in a browser if there is one."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import ConfigError, DataError
from megalite.parallel.grid import Grid
from megalite.parallel.timeline import Span as Timed
from megalite.programs.program import Action
from megalite.report.charts import smoothed, thinned
from megalite.report.numbers import short, ticks
from megalite.report.pipeline import DrawnSpan, bubble, measured
from megalite.report.rank_table import MOST_CELLS, grid_picture, memory_table
from megalite.report.read import MOST_ROWS, read_run
from megalite.report.report_program import main, write_report
from megalite.report.run_timeline import fault_times, starts
from megalite.report.trace_events import with_bubbles
from megalite.training.tracing import events_of

CHROMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><script>document.title = 'pwned'</script><img src=x onerror=alert(1)>"


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def step_row(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 5 - step / 100, "grad_norm": 1.0, "learning_rate": 1e-3, "mfu": 0.4,
        "consumed_samples": 8 * step, "consumed_tokens": 800 * step, "step_seconds": 1.0,
        "tokens_per_second": 800.0, "unix_seconds": 1000.0 + step, "goodput": 0.9, **fields,
    }  # fmt: skip


def run_folder(folder: Path, steps: int = 50) -> Path:
    """A run of 2 ranks on the pipe axis that was killed after step 30 and resumed from step 20."""
    (folder / "checkpoints" / "step_00000050").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000050" / "w").write_bytes(b"0" * 2048)
    (folder / "checkpoints" / "latest").write_text("step_00000050\n")
    rows: list[dict[str, Any]] = [step_row(step) for step in range(1, steps + 1)]
    rows[0] |= {
        name: [100, 200] for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    }
    rows[9] |= {"loss": None, "grad_norm": None, "skipped": "not_finite"}
    sample = {"prompt": "def ", "text": HOSTILE}
    rows.insert(20, {"step": 20, "valid_loss": 4.5, "valid_perplexity": 90.0, "samples": [sample]})
    rows.append({"step": steps, "valid_loss": 4.25, "valid_perplexity": 70.1})
    (folder / "metrics.jsonl").write_text(lines(rows) + '{"step": 51, "lo')
    config = {
        "train_batch_size": 8,
        "megalite": {"train": {"steps": steps, "run_dir": str(folder)}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    actions = [
        [["F", 0, 0, 0.0, 0.2], ["B", 0, 0, 0.7, 1.0]],
        [["F", 1, 0, 0.2, 0.4], ["B", 1, 0, 0.4, 0.7]],
    ]
    states = {"weights_bytes": 100, "gradients_bytes": 200, "optimizer_bytes": 100}
    about = {
        "model": "llama", "parameters": 1234, "grid": {"pipe": 2, "data": 1, "tensor": 1},
        "predicted": [states, states], "differing": [["train_batch_size", 8, None]],
        "pipeline": {"schedule": "1f1b", "micro_batches": 1, "shown_micro_batches": 1, "chunks": 1,
                     "bubble": 0.5, "actions": actions},
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))
    corpora = [
        {"path": "data/a", "asked": 0.75, "samples": 300},
        {"path": "data/b", "asked": 0.25, "samples": 100},
    ]
    history = [
        {"event": "start", "unix_seconds": 1000.0, "step": 0, "grid": "pipe 2", "last_seen": 0.0},
        {"event": "checkpoint", "unix_seconds": 1020.0, "step": 20},
        {
            "event": "start",
            "unix_seconds": 1100.0,
            "step": 20,
            "grid": "pipe 2",
            "last_seen": 1030.0,
        },
        {
            "event": "end",
            "unix_seconds": 1150.0,
            "step": steps,
            "reason": "done",
            "corpora": corpora,
        },
    ]
    (folder / "history.jsonl").write_text(lines(history))
    fault = {"step": 10, "kind": "not_finite", "text": "loss is nan", "action": "skip"}
    (folder / "faults.jsonl").write_text(lines([fault]))
    (folder / "faults" / "1").mkdir(parents=True)
    (folder / "faults" / "1" / "summary.txt").write_text("rank 1 on a was killed\nmore\n")
    return folder


class _Tags(HTMLParser):
    """Counts tags, and collects the resources that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "action")]
        self.loads += [value or "" for name, value in attrs if tag == "link" and name == "href"]


def test_a_page_shows_all_of_a_run_and_loads_nothing(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    found = _Tags()
    found.feed(text)
    assert found.loads == [] and found.tags.count("script") == 1 and "@import" not in text
    assert re.findall(r"(?:url\(|https?://)", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert text.count('<svg class="chart"') == 6
    for words in (
        "50 of 50", "4.2500 at step 50", "1.234 k", "data/a", "rank 1 on a was killed",
        "step 10: loss is nan (skip)", "restarted from step 20", "step_00000050",
        "no end recorded: killed, or still running",
        'href="checkpoints/step_00000050/"', "predicted 100 B, +100.00 %", "as predicted",
        "(p − 1) / (m + p − 1) = 50 %", "bubble: rank 1 of the pipe axis is idle 50 % of the step",
    ):  # fmt: skip
        assert words in text, words
    assert HOSTILE not in text and "onerror=alert(1)&gt;" in text


def test_a_start_that_was_killed_ends_with_its_last_row(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run"))
    assert [(start.begin, start.end, start.reason) for start in starts(run)] == [
        (1000.0, 1030.0, ""),
        (1100.0, 1150.0, "done"),
    ]
    assert [at for at, _ in fault_times(run)] == [1010.0]
    assert run.best == {"step": 50, "valid_loss": 4.25, "valid_perplexity": 70.1}


@pytest.mark.parametrize(
    "missing", ["about.json", "history.jsonl", "faults.jsonl", "config.json", "metrics.jsonl"]
)
def test_anything_but_one_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    run = run_folder(tmp_path / "run")
    (run / missing).unlink()
    write_report([run], run / "report.html")
    assert "<section>" in (run / "report.html").read_text()


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    own = Path.rglob

    def gone(self: Path, pattern: str) -> Any:
        if self.name == "step_00000001":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return own(self, pattern)

    monkeypatch.setattr(Path, "rglob", gone)
    assert [found.name for found in read_run(tmp_path).checkpoints] == ["step_00000002"]


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match="must be a run folder"):
        main([str(tmp_path)])
    with pytest.raises((ConfigError, DataError), match="cannot be written"):
        main([str(run_folder(tmp_path / "run")), "--output", str(tmp_path / "none" / "page.html")])


def test_several_runs_side_by_side_name_what_differs(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name) for name in "ab"]
    output = tmp_path / "pages" / "both.html"
    output.parent.mkdir()
    assert main([*map(str, runs), "--output", str(output)]) == 0
    text = output.read_text()
    assert "megalite.train.run_dir" in text and "<td>train_batch_size</td>" not in text
    assert 'href="../b/checkpoints/step_00000050/"' in text
    assert "a: Pipeline" in text and "b: Pipeline" in text


def test_a_long_run_is_thinned_and_keeps_its_peaks(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    count = 3 * MOST_ROWS
    rows = [step_row(step) for step in range(1, count + 1)]
    rows.insert(7, {"step": 7, "valid_loss": 3.0, "valid_perplexity": 20.0})
    (run / "metrics.jsonl").write_text(lines(rows))
    found = read_run(run)
    assert len(found.steps) <= MOST_ROWS + 1 and found.last["step"] == count
    assert len(found.evaluations) == 1
    points = [(float(x), float(x == 4567)) for x in range(10_000)]
    assert len(thinned(points)) <= 800 and max(y for _, y in thinned(points)) == 1.0
    assert smoothed([(1.0, 2.0), (2.0, 2.0)])[-1][1] == pytest.approx(2.0)


def test_numbers_are_short_and_ticks_are_round() -> None:
    assert [short(value) for value in (0, 12_345, 1.23456, 5e-5, 2e9)] == [
        "0", "12.35 k", "1.235", "5e-05", "2 G",
    ]  # fmt: skip
    assert ticks(0.3, 10.2) == pytest.approx([2, 4, 6, 8, 10])
    assert ticks(1.0, 1.0) == [1.0]


def test_bubbles_are_named_and_measured() -> None:
    spans = [DrawnSpan("F", "F0.0", 0.0, 1.0), DrawnSpan("B", "B0.0", 3.0, 5.0)]
    assert [
        (span.name, span.start, span.end)
        for span in with_bubbles(spans, 6.0)
        if span.kind == "bubble"
    ] == [
        ("bubble: wait for B0.0", 1.0, 3.0),
        ("bubble: end", 5.0, 6.0),
    ]
    grid = {"pipe": 2, "data": 1, "tensor": 2}
    events = [traced(pid, ts, 3, grid) for pid, ts in ((0, 0.0), (1, 0.0), (2, 1e6), (3, 1e6))]
    step, rows = measured(events, grid)
    assert step == 3 and [len(row) for row in rows] == [1, 1] and bubble(rows) == pytest.approx(0.5)


def traced(pid: int, ts: float, step: int, grid: dict[str, int]) -> dict[str, Any]:
    """A rank's action in a trace, one second long."""
    args = {"step": step, "kind": "F", "grid": grid}
    return {"cat": "action", "pid": pid, "ts": ts, "dur": 1e6, "name": "F", "args": args}


def test_a_trace_of_an_earlier_grid_is_not_measured(tmp_path: Path) -> None:
    """A run that was traced on pipe 4 and resumed on pipe 2."""
    run = run_folder(tmp_path / "run")
    wide = [traced(pid, 1e6 * pid, 9, {"pipe": 4, "data": 1, "tensor": 1}) for pid in range(4)]
    (run / "trace.json").write_text(json.dumps({"traceEvents": wide}))
    assert main([str(run)]) == 0
    assert "Measured in step" not in (run / "report.html").read_text()
    now = {"pipe": 2, "data": 1, "tensor": 1}
    assert measured(wide, now) == (0, [])
    step, rows = measured([*wide, *(traced(pid, 0.0, 5, now) for pid in range(2))], now)
    assert step == 5 and [len(row) for row in rows] == [1, 1]


def test_a_traced_action_names_its_grid() -> None:
    spans = [Timed("action", Action("F", 0, 0), "", 0.0, 1.0)]
    _, event = events_of(spans, Grid.at(0, pipe=2, data=1, tensor=2), 3, 0.0)
    assert event["args"]["grid"] == {"pipe": 2, "data": 1, "tensor": 2}


def test_the_loss_of_a_classifier_is_a_mean_over_texts(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    about = json.loads((run / "about.json").read_text())
    assert main([str(run)]) == 0
    assert "Training loss, nats per token" in (run / "report.html").read_text()
    (run / "about.json").write_text(json.dumps({**about, "loss_unit": "nats per text"}))
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "Training loss, nats per text" in text and "Validation loss, nats per text" in text
    assert "nats per token" not in text


@pytest.mark.parametrize(
    ("pipe", "data", "note"),
    [
        (2, 4, ""),
        (1000, 4, "The first 64 of 1,000 rows."),
        (1, 1000, "The first 256 of 1,000 columns."),
        (3, 1000, "The first 1 of 3 rows, and the first 256 of 1,000 columns."),
    ],
)
def test_a_picture_of_many_ranks_shows_some_and_says_so(pipe: int, data: int, note: str) -> None:
    states = {"weights_bytes": 1, "gradients_bytes": 1, "optimizer_bytes": 1}
    picture = grid_picture({"pipe": pipe, "data": data}, [states] * pipe * data, {})
    assert picture.count("<td") == min(pipe * data, MOST_CELLS)
    assert f"</div><p>{note}</p>" in picture if note else "The first" not in picture


def test_bytes_that_were_predicted_to_be_none_have_no_share() -> None:
    table = memory_table([{"weights_bytes": 0}], {"weights_bytes": [2048]})
    assert "2 KiB <small>predicted 0 B</small>" in table


PROBE = """<script>
const probe = [];
const first = document.querySelector("svg.chart"), area = first.getBoundingClientRect();
const at = { clientX: area.left + area.width * 0.5, clientY: area.top + 40, bubbles: true };
first.dispatchEvent(new PointerEvent("pointermove", at));
probe.push(document.getElementById("hover").textContent, getComputedStyle(hover).display);
probe.push(document.documentElement.scrollWidth <= innerWidth);
const ground = () => getComputedStyle(document.body).backgroundColor;
probe.push(ground());
document.getElementById("theme").click();
probe.push(ground(), document.title);
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(probe);
document.body.append(out);
</script>"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_in_a_browser_the_page_fits_and_shows_what_is_under_the_pointer(
    tmp_path: Path, width: int, scheme: int
) -> None:
    browser = next(filter(None, map(shutil.which, CHROMES)), None)
    if browser is None:
        pytest.skip("no headless Chromium: apt-get install chromium-headless-shell")
    run = run_folder(tmp_path / "run")
    main([str(run)])
    page = tmp_path / "probed.html"
    page.write_text((run / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    arguments = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=90)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    hover, display, fits, ground, other, title = json.loads(found[1].replace("&amp;", "&"))
    assert re.fullmatch(r"step \d+\d*4\.\d+", hover) and display == "block", hover
    assert fits and title == "run"
    dark, light = "rgb(20, 23, 27)", "rgb(255, 255, 255)"
    assert [ground, other] == ([light, dark] if scheme else [dark, light])


def test_another_file_is_not_written_over(tmp_path: Path) -> None:
    """Devices are not overwritten either: /dev/full once became a page."""
    run = run_folder(tmp_path / "run")
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html>\n<p>mine")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (notes, pipe, run / "config.json"):
        with pytest.raises(DataError, match=f"^{path}: already exists and is not a report; choose"):
            main([str(run), "--output", str(path)])
    assert notes.read_text().endswith("mine") and pipe.is_fifo()
    for _ in range(2):  # an earlier page is replaced
        assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    with pytest.raises(DataError, match="run: already exists and is not a report"):
        main([str(run), "--output", str(run)])
    assert list(tmp_path.glob(".*")) == []
