"""`tools/report.py`: run folders as one page.

python tools/report.py runs/a [runs/b …] [--trace] [--output FILE]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megalite.errors import ConfigError, DataError
from megalite.inputs import reading
from megalite.ranks.arguments import ArgumentParser
from megalite.report.page import START, page
from megalite.report.read import REPORT, TRACE, read_run
from megalite.report.trace_events import simulated_events

SIMULATED = "trace_simulated.json"


def main(arguments: list[str]) -> int:
    """Writes the page, prints its path, and returns 0. Raises UserError with one line."""
    parser = ArgumentParser(description="Show run folders as one page, report.html.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="default: RUN/report.html for one run, report.html here for several",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="also print the path of each run's trace for Perfetto: trace.json with the steps that the run has traced "
        "(megalite.train.trace_steps); for a run without one, write the simulated step to trace_simulated.json",
    )
    options = parser.parse_args(arguments)
    several = len(options.runs) > 1
    output = options.output or (Path(REPORT) if several else options.runs[0] / REPORT)
    with reading(str(options.runs[0])):
        if options.trace:
            for path in options.runs:
                print(_trace(path), file=sys.stderr)
        try:
            write_report(options.runs, output)
        except OSError as error:
            raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
    print(output)
    return 0


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Writes the page of one or several run folders; replaces an earlier page. Raises DataError if a folder is not a
    run's or `output` is another kind of file, and OSError."""
    content = page([read_run(path) for path in runs], output.parent)
    if output.exists() and not _is_page(output):
        raise DataError(f"{output}: already exists and is not a report; choose another file")
    part = output.with_name(f".{output.name}.part")
    try:
        part.write_text(content, encoding="utf-8", errors="backslashreplace")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def _is_page(path: Path) -> bool:
    """Whether a file starts like a page, or is empty."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(START)) in (b"", START.encode())


def _trace(path: Path) -> str:
    """The line about a run's trace. Writes the simulated trace if the run has none."""
    run = read_run(path)
    if run.trace:
        steps = sorted(
            {event["args"]["step"] for event in run.trace if event.get("cat") == "action"}
        )
        return f"{path / TRACE}: steps {', '.join(map(str, steps))}; open it in https://ui.perfetto.dev"
    events = simulated_events(run)
    if not events:
        rule = "has no trace and no pipeline: set megalite.train.trace_steps to trace steps"
        raise DataError(f"{path}: {rule}")
    (path / SIMULATED).write_text(json.dumps({"traceEvents": events}))
    return f"{path / SIMULATED}: simulated; set megalite.train.trace_steps to measure"
