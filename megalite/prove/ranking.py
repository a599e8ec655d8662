"""`tools/benchmark_plan.py`: whether layouts rank as the planner predicts. One small model, one calibration, layouts of
1 to 8 ranks: predicted and measured step times, Kendall's tau, the chosen layout compared with the best; and memory.

On a CPU each rank computes on one thread. The measured time is wall-clock time. If other programs used more than a
tenth of the machine's CPU time, it is the CPU time of all ranks over the cores that they could use, and the prediction
is without the bubble: then neither includes waits.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megalite.config import Config
from megalite.config.reading import apply_overrides
from megalite.config.rules import machine_has_gpu
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.plan.candidates import given_candidate
from megalite.plan.device_figures import Device, device_of
from megalite.plan.plan_program import planner_of
from megalite.plan.rank_memory import MemoryTable, SizesByStage
from megalite.plan.search import PlannedLayout
from megalite.plan.states import (
    grid_at,
    parameter_sizes,
    predicted_states,
)
from megalite.prove.calibrate import calibrated, device_lines, random_corpus
from megalite.prove.clocks import QUIET, cores, others_share
from megalite.prove.layouts import Layout, config_of
from megalite.ranks.arguments import ArgumentParser, at_least
from megalite.ranks.local import run_local_ranks

RANK_MODULE = "megalite.prove.ranking_rank"
BATCH, LENGTH, VOCABULARY = 8, 128, 2048
RECOMPUTE = "megalite.train.activation_checkpointing=full"
LAYOUTS = [
    "zero=1,micro=8",
    "zero=1,micro=1",
    f"zero=1,micro=4 {RECOMPUTE}",
    "data=2,zero=1,micro=4",
    "data=2,zero=2,micro=1",
    "data=2,zero=3,micro=4",
    "tensor=2,zero=1,micro=8",
    "tensor=2,zero=1,micro=1",
    "pipe=2,zero=1,micro=1",
    "pipe=2,zero=1,micro=4",
    "pipe=2,zero=1,micro=2,schedule=zb-h1",
    f"pipe=2,zero=1,micro=2 {RECOMPUTE}",
    "data=4,zero=1,micro=2",
    "data=4,zero=3,micro=1",
    "tensor=4,zero=1,micro=4",
    "tensor=2,data=2,zero=1,micro=4",
    "pipe=2,data=2,zero=1,micro=2",
    "pipe=4,zero=1,micro=1",
    "pipe=4,zero=1,micro=1,schedule=interleaved,chunks=2",
    "pipe=2,tensor=2,zero=1,micro=2",
    "data=8,zero=1,micro=1",
    "data=8,zero=2,micro=1",
    "tensor=8,zero=1,micro=8",
    "tensor=4,data=2,zero=1,micro=2",
    "pipe=4,data=2,zero=1,micro=1",
    "pipe=2,tensor=2,data=2,zero=1,micro=2",
]
GOAL_TAU, GOAL_CHOICE, GOAL_PEAK = 0.8, 0.05, 0.02


@dataclass
class RankingCase:
    """A layout, its predictions, and the measurements of its ranks."""

    name: str
    config: Config
    planned: PlannedLayout
    ranks: list[dict[str, Any]]

    @property
    def world_size(self) -> int:
        return self.config.world_size

    def others(self) -> float:
        """Share of the machine's CPU time that other programs used during its steps."""
        return median(
            others_share(
                times[0]["wall_seconds"],
                times[0]["machine_seconds"],
                sum(rank["processor_seconds"] for rank in times),
            )
            for times in self._steps()
        )

    def _steps(self) -> list[tuple[dict[str, float], ...]]:
        return list(zip(*(rank["times"] for rank in self.ranks), strict=True))

    def measured(self, wall: bool) -> float:
        """Median seconds of a step."""
        if wall:
            return median(max(rank["wall_seconds"] for rank in times) for times in self._steps())
        usable = min(self.world_size, cores())
        return median(
            sum(rank["processor_seconds"] for rank in times) / usable for times in self._steps()
        )

    def predicted(self, wall: bool) -> float:
        """Predicted seconds of a step."""
        time = self.planned.time
        return time.seconds - (0.0 if wall else time.parts["bubble"])


def main(arguments: list[str]) -> int:
    """Prints the tables; returns 0. Raises UserError with one line."""
    parser = ArgumentParser(
        "benchmark_plan.py",
        description="Measure layouts and compare with the planner's predictions.",
    )
    parser.add_argument(
        "--device",
        metavar="FILE",
        help="a file written by tools/benchmark_step.py --calibrate (default: calibrate first)",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=5,
        metavar="N",
        help="timed steps per layout",
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        metavar="LAYOUT",
        help=f"two or more, such as data=2,zero=2,micro=1 (default: {len(LAYOUTS)} of 1 to 8 ranks)",
    )
    options = parser.parse_args(arguments)
    if options.layouts is not None:
        _check(options.layouts)
    device = _calibrated() if options.device is None else device_of(options.device)
    print(device_lines(device, Path(options.device or "calibrated now")), flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark_plan_") as folder:
        random_corpus(Path(folder) / "train", VOCABULARY, tokens=300_000)
        cases = _measured(folder, device, options.steps, options.layouts or LAYOUTS)
    print("\n".join(["", *step_table(cases), "", *memory_table(cases)]), flush=True)
    return 0


def _check(layouts: Sequence[str]) -> None:
    """Raises ConfigError if these cannot be ranked on this machine."""
    if len(layouts) < 2:
        raise ConfigError(f"--layouts: {layouts[0]}: must be two or more, to be ranked")
    for text in layouts:
        ranks, most = Layout.parse((text.split() or [text])[0]).world_size, _most_ranks()
        if ranks > most:
            raise ConfigError(
                f"--layouts: {text}: {ranks} ranks: must be at most {most} on this machine"
            )


def _calibrated() -> Device:
    device, _, _ = calibrated()
    return device


def document(folder: str) -> dict[str, Any]:
    """The config to be trained: 7.5 M parameters, 1,024 tokens per step; on GPUs 1.4 B and 32,768."""
    gpu = machine_has_gpu()
    hidden, length, vocabulary = (2048, 4096, 32000) if gpu else (256, LENGTH, VOCABULARY)
    precision = {"bf16": {"enabled": True}} if gpu else {}
    return {
        "train_batch_size": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000 if gpu else 2_000_000},
        **precision,
        "megalite": {
            "model": {
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": 11 * hidden // 4,
                "num_hidden_layers": 24 if gpu else 8,
                "num_attention_heads": 16 if gpu else 8,
                "num_key_value_heads": 16 if gpu else 8,
                "vocab_size": vocabulary,
                "max_position_embeddings": length,
                "tie_word_embeddings": False,
            },
            "data": {"sequence_length": length, "train": [f"{folder}/train"]},
            "train": {"steps": 1000, "run_dir": f"{folder}/run"},
        },
    }


def _measured(folder: str, device: Device, steps: int, layouts: Sequence[str]) -> list[RankingCase]:
    """Measures the layouts that fit on this machine; those of equal world size take turns. Those with ZeRO-3 are
    started separately: it replaces torch's linear function (runtime/zero/linear.py) for the rest of the process."""
    most = _most_ranks()
    starts: dict[tuple[int, bool], list[RankingCase]] = {}
    for text in layouts:
        layout, *own = text.split()
        config = config_of(
            _with(Config.from_dict(document(folder)), own), Layout.parse(layout), BATCH
        )
        if config.world_size <= most:
            planned = planned_layout(config, device)
            start = starts.setdefault((config.world_size, config.zero_stage == 3), [])
            start.append(RankingCase(text, config, planned, []))
    for (world_size, _), cases in starts.items():
        configs = [case.config.to_json() for case in cases]
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"configs": configs, "steps": steps, "folder": folder}))
        run_local_ranks(world_size, RANK_MODULE, [str(request)])
        for rank in range(world_size):
            found = json.loads((Path(folder) / f"rank{rank}.json").read_text())
            for case, row in zip(cases, found, strict=True):
                case.ranks.append(row)
    return [case for cases in starts.values() for case in cases]


def _with(config: Config, overrides: Sequence[str]) -> Config:
    return Config.from_dict(apply_overrides(config.to_json(), list(overrides)))


def _most_ranks() -> int:
    if not machine_has_gpu():
        return 8
    return torch.accelerator.device_count()


def planned_layout(config: Config, device: Device) -> PlannedLayout:
    """The predictions for a resolved config."""
    planner, _ = planner_of(config, config.world_size, device, device.memory_bytes)
    return planner.layout(config, given_candidate(config))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau of two rankings: concordant minus discordant pairs, over all pairs (Kendall 1938)."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    signs = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(pairs)


def step_table(cases: Sequence[RankingCase]) -> list[str]:
    """Predicted and measured step times, slowest first, and a summary."""
    others = median(case.others() for case in cases)
    wall = machine_has_gpu() or others <= QUIET
    predicted = [case.predicted(wall) for case in cases]
    measured = [case.measured(wall) for case in cases]
    rows = sorted(zip(predicted, measured, cases, strict=True), key=lambda row: -row[1])
    lines = ["| ranks | layout | predicted s | measured s | off by |", "|---|---|---|---|---|"]
    lines += [
        f"| {case.world_size} | {case.name.replace(RECOMPUTE, 'recompute')} | {there:.3f} | {here:.3f} | "
        f"{100 * (there / here - 1):+.0f} % |"
        for there, here, case in rows
    ]
    chosen = measured[predicted.index(min(predicted))]
    slower = chosen / min(measured) - 1
    off = sorted(abs(there / here - 1) for there, here, _ in rows)
    clock = "wall-clock time" if wall else "CPU time, without waits"
    return [
        *lines,
        "",
        f"{len(cases)} layouts by {clock} ({100 * others:.0f} % of the machine's CPU time went to other programs): "
        f"Kendall's tau {kendall_tau(predicted, measured):.3f} (goal {GOAL_TAU}); the chosen layout, "
        f"{cases[predicted.index(min(predicted))].name}, is {100 * slower:.1f} % slower than the best measured, "
        f"{cases[measured.index(min(measured))].name} (goal {100 * GOAL_CHOICE:.0f} %); predictions are off by "
        f"{100 * median(off):.0f} % at the median, {100 * off[-1]:.0f} % at most",
    ]


def memory_table(cases: Sequence[RankingCase]) -> list[str]:
    """States of all ranks, compared to the byte, and the peak of the rank with the most."""
    lines = [
        "| ranks | layout | states as predicted | peak predicted MB | peak measured MB | off by |",
        "|---|---|---|---|---|---|",
    ]
    exact, off = 0, []
    for case in cases:
        predicted = [predicted_states_of(case.config, rank) for rank in range(case.world_size)]
        held = [
            tuple(row[f"{name}_bytes"] for name in ("weights", "gradients", "optimizer"))
            for row in case.ranks
        ]
        same = sum(states == own for states, own in zip(predicted, held, strict=True))
        exact += same == case.world_size
        there = predicted_peak(case.config)
        here = max(row["peak_bytes"] for row in case.ranks)
        off.append(abs(there / here - 1))
        lines.append(
            f"| {case.world_size} | {case.name.replace(RECOMPUTE, 'recompute')} | {same} of {case.world_size} ranks | "
            f"{there / 1e6:.1f} | {here / 1e6:.1f} | {100 * (there / here - 1):+.1f} % |"
        )
    within = sum(share <= GOAL_PEAK for share in off)
    return [
        *lines,
        "",
        f"model states are as predicted, to the byte, in {exact} of {len(cases)} layouts; the peak of torch's "
        f"allocations is within {100 * GOAL_PEAK:.0f} % in {within}, off by {100 * median(off):.1f} % at the median",
    ]


def predicted_states_of(config: Config, rank: int) -> tuple[int, int, int]:
    """Predicted bytes of a rank's weights, gradients and optimizer states."""
    spec, grid = read_spec(config.model), grid_at(config, rank)
    states = predicted_states(config, parameter_sizes(config, spec, grid), grid)
    return states.weights, states.gradients, states.optimizer


def predicted_peak(config: Config) -> int:
    """Predicted peak of torch's allocations on the largest rank, without what already exists before a step and is not a
    state: ZeRO-3's bucket."""
    largest = MemoryTable(config, read_spec(config.model), None, SizesByStage()).largest
    return largest.total - (largest.buckets if config.zero_stage == 3 else 0)
