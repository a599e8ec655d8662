"""The output of a run for its user: trace, samples, step time, TensorBoard, trackers, history, report."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalite.checkpoint.files import Checkpoint
from megalite.checkpoint.weights import load_module
from megalite.config import Config
from megalite.data.tokenizer import load_tokenizer
from megalite.inference.generate import Generator
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.pipeline_plan import plan_of
from megalite.training import mfu
from tests.byte_model import save_byte_model
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, rows, train

STEPS, TRACED, NEW = 4, 2, 5
PROMPTS = ["ab", "hello", "x"]
SKEW_SECONDS = 1000.0


class Recorded(GeneralTracker):
    """Writes what it receives into a file."""

    name, requires_logging_directory = "recorded", True

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        super().__init__()
        self.path = logging_dir / f"{run_name}.jsonl"

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _add(self, entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._add(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._add([step, values])

    def finish(self) -> None:
        self._add("finished")


@contextlib.contextmanager
def skewed(rank: int) -> Iterator[None]:
    """Each rank's clock has a different zero."""
    clock = time.perf_counter
    with (
        mock.patch.object(time, "perf_counter", lambda: clock() + SKEW_SECONDS * rank),
        mock.patch.dict(LOGGER_TYPE_TO_CLASS, {"recorded": Recorded}),
    ):
        yield


@contextlib.contextmanager
def rated(folder: Path, rank: int) -> Iterator[None]:
    """Rank r computes (r + 1) GFLOP/s. The timeout of the run's groups is written to a file of the rank."""
    build = Grid.build

    def recorded(*sizes: int, timeout: timedelta, **more: Any) -> Grid:
        (folder / f"timeout_{rank}").write_text(str(timeout.total_seconds()))
        return build(*sizes, timeout=timeout, **more)

    with (
        mock.patch.object(mfu, "measured_flops", lambda device, dtype: 1e9 * (rank + 1)),
        mock.patch.object(Grid, "build", recorded),
    ):
        yield


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of the same training on different layouts: `a` and `b` on four ranks, `c` on one."""
    folder = tmp_path_factory.mktemp("watched")
    save_byte_model(folder / "hf")

    def of(run: str, layout: dict[str, Any], **keys: Any) -> dict[str, Any]:
        keys = {
            "sample_prompts": PROMPTS,
            "sample_tokens": NEW,
            "eval_interval": 2,
            "steps": STEPS,
        } | keys
        made = document(folder, run, layout, train=keys)
        made["megalite"]["data"]["tokenizer"] = str(folder / "hf")
        made["megalite"]["model"] |= {"num_hidden_layers": 4}
        return made

    watching = {
        "trace_steps": [TRACED],
        "faults": {"pace_interval": 2},
        "tensorboard": True,
        "trackers": ["recorded"],
    }
    a = of("a", {"pipe": 2, "schedule": "zb-v", "zero": 1}, **watching)
    b = of("b", {"tensor": 2, "context": 2, "zero": 3}, limits={"step_seconds": 4000})
    runs = [(a, skewed), (b, partial(rated, folder))]
    assert run_ranks(4, train, runs, timeout_seconds=200) == [[0, 0]] * 4
    assert run_ranks(1, train, [(of("c", {}), nothing)]) == [[0]]
    return folder


def samples(run: Path) -> list[tuple[int, list[dict[str, str]]]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["samples"]) for row in lines if "samples" in row]


def test_samples_are_the_same_on_every_layout_and_those_of_generation(watched: Path) -> None:
    found = samples(watched / "c")
    assert [step for step, _ in found] == [2, 4]
    assert samples(watched / "a") == samples(watched / "b") == found
    checkpoint = Checkpoint.open(watched / "c" / "checkpoints" / f"step_{STEPS:08d}")
    stage = Stage(read_spec(checkpoint.model), Grid())
    load_module(checkpoint.read, stage)
    tokenizer = load_tokenizer(str(watched / "hf"))
    texts = Generator(stage, Grid()).generate([tokenizer.encode(prompt) for prompt in PROMPTS], NEW)
    assert [one["text"] for one in found[-1][1]] == [
        tokenizer.decode([*text.prompt, *text.tokens])[len(prompt) :]
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    assert [one["prompt"] for one in found[-1][1]] == PROMPTS


def test_a_trace_has_every_action_and_message_on_one_clock(watched: Path) -> None:
    run = watched / "a"
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    program = plan_of(config, read_spec(config.model)).program(config.accumulation_steps)
    for rank in range(4):
        done = [
            event["name"]
            for event in events
            if event["pid"] == rank and event.get("cat") == "action"
        ]
        assert done == [str(action) for action in program.actions[rank // 2]]
    ends: dict[str, dict[str, float]] = {}
    for event in events:
        if event.get("cat") == "message" and "id" in event:
            ends.setdefault(event["id"], {})[event["ph"]] = event["ts"]
    sent = [program.gives(action) for _, action in program.all_actions()]
    assert len(ends) == 2 * sum(program.crosses(value) for value in sent)  # two pipelines
    for message in ends.values():
        # Unaligned clocks would be 1000 s apart; on a busy machine they are aligned within milliseconds.
        assert message["s"] < message["f"] + 0.5e6
    times = [event["ts"] for event in events if event["ph"] == "X"]
    assert max(times) - min(times) < 60e6
    assert any(event["name"].startswith("bubble: wait for activation of chunk") for event in events)
    axes = Counter(
        event["name"].split()[-1] for event in events if event.get("cat") == "collective"
    )
    assert axes["data"] > 0 and axes["world"] > 0
    assert {event["args"]["step"] for event in events if event["ph"] == "X"} == {TRACED}


def test_the_time_of_a_step_is_split_up(watched: Path) -> None:
    measured = [row for row in rows(watched / "a") if "split_seconds" in row]
    assert [row["step"] for row in measured] == [2, 4]
    for row in measured:
        parts = row["split_seconds"]
        assert {"compute", "wait pipe", "wait data", "data", "update", "other"} <= parts.keys()
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(row["step_seconds"], rel=0.5)
    assert not any("split_seconds" in row for row in rows(watched / "b"))


def test_mfu_is_of_all_ranks_together(watched: Path) -> None:
    made = Config.from_dict(document(watched, "b", {}))
    spec = read_spec(json.loads((watched / "b" / "config.json").read_text())["megalite"]["model"])
    flops_per_token = spec.flops_per_token(made.data.sequence_length, 1.0)
    for row in rows(watched / "b"):
        flops = row["tokens_per_second"] * flops_per_token
        assert row["tflops_per_rank"] == pytest.approx(flops / 4 / 1e12)
        assert row["mfu"] == pytest.approx(flops / (1e9 + 2e9 + 3e9 + 4e9))


def test_groups_wait_longer_than_every_limit_of_the_run(watched: Path) -> None:
    assert [(watched / f"timeout_{rank}").read_text() for rank in range(4)] == ["4300.0"] * 4


def test_tensorboard_and_trackers_have_groups_config_and_texts(watched: Path) -> None:
    found = EventAccumulator(str(watched / "a" / "tensorboard"))
    found.Reload()
    scalars = set(found.Tags()["scalars"])
    assert {
        "train/loss",
        "speed/mfu",
        "speed/split_seconds/compute",
        "memory/weights_bytes",
    } <= scalars
    assert all(
        tag.split("/")[0] in ("train", "valid", "speed", "memory", "checkpoint") for tag in scalars
    )
    texts = set(found.Tags()["tensors"])
    assert {"config/text_summary", "valid/sample_0/text_summary"} <= texts
    lines = (watched / "a" / "trackers" / "a.jsonl").read_text().splitlines()
    first, *logged, last = map(json.loads, lines)
    assert first["zero_optimization.stage"] == 1 and last == "finished"
    assert [step for step, values in logged if "train/loss" in values] == [1, 2, 3, 4]
    (_, shown), (_, latest) = [
        (step, values) for step, values in logged if "valid/sample_1" in values
    ]
    assert shown["valid/sample_1"].startswith("hello") and latest["valid/sample_1"].startswith(
        "hello"
    )


def test_a_run_leaves_its_history_and_a_report(watched: Path) -> None:
    run = watched / "a"
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [(row["event"], row["step"]) for row in history] == [
        ("start", 0),
        ("checkpoint", 4),
        ("end", 4),
    ]
    assert history[-1]["reason"] == "done" and history[-1]["corpora"][0]["samples"] == 32
    text = (run / "report.html").read_text()
    for words in (
        f"Measured in step {TRACED}:",
        "Schedule zb-v",
        "step 4</summary>",
        "wait pipe",
        "as predicted",
    ):
        assert words in text, words
