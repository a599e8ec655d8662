"""`tools/benchmark_step.py`: step time, memory by rank and bytes sent by axis of several layouts in one run, compared
with a plain PyTorch loop over transformers' model of the same shape. A layout may have its own config keys, so that
options can be compared too: `--layouts data=2 "data=2 megalite.train.activation_checkpointing=full"`. With
`--calibrate FILE` it measures the machine instead (calibrate.py).

The plain loop is one process: without a GPU it has all cores, which a layout's ranks share; with GPUs it has one, and a
layout one per rank. It runs before and after the layouts, so that drift of the machine is visible.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megalite.config import Config, load_config
from megalite.data.loader import TrainData
from megalite.engine.nvme import check_nvme
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.pipeline.pipeline_plan import plan_of
from megalite.plan.states import grid_at, predicted_activations
from megalite.prove.calibrate import calibrate_to, device_lines
from megalite.prove.layouts import Layout, base_batch, config_of, layouts_parser
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.local import check_room, run_local_ranks
from megalite.topology.axes import SHOWN_AXES

RANK_MODULE = "megalite.prove.benchmark_rank"
MEGABYTE = 1e6
AXES = (*SHOWN_AXES, "replica", "ends", "other")
STATES = ("weights_bytes", "gradients_bytes", "optimizer_bytes")


def main(arguments: list[str]) -> int:
    """Prints the figures; returns 0. Raises UserError with one line."""
    parser = layouts_parser(
        "benchmark_step.py",
        "Measure a training step on several layouts.",
        'pipe=2,tensor=2,data=2,zero=2, or with its own config keys "data=2 KEY=VALUE …"',
        "timed steps per layout",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="measure this machine for tools/plan.py --device FILE instead, without other arguments",
    )
    if (path := _calibration(arguments)) is not None:
        print(device_lines(calibrate_to(path), path), flush=True)
        return 0
    options = parser.parse_args(arguments)
    overrides = [*options.set, "megalite.train.batch_ramp=null"]
    config = load_config(options.deepspeed_config, overrides)
    cases = [
        BenchmarkCase.parse(text, options.deepspeed_config, overrides) for text in options.layouts
    ]
    batch = base_batch(config, cases[0].layout)
    configs = {case.name: config_of(case.config, case.layout, batch) for case in cases}
    for case in cases:
        check_room(case.layout.world_size, case.name)
        check_nvme(configs[case.name], read_spec(configs[case.name].model), case.layout.world_size)
    # ZeRO-1 only makes the config valid with bf16: the plain loop does not use DeepSpeed.
    alone = config_of(config, Layout(zero=1), batch, offload=False)
    TrainData(alone.data, alone.train.seed, read_spec(alone.model).vocabulary_size)
    tokens = batch * alone.data.sequence_length
    before = measured(alone, 1, options.steps, plain=True)
    print(
        f"plain PyTorch, 1 process: {_speed(before, tokens)}, peak {_megabytes(before, 'peak_bytes')} MB\n"
        f"{split_line(before)}",
        flush=True,
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, one in configs.items():
        rows[name] = measured(one, one.world_size, options.steps)
        for rank, row in enumerate(rows[name]):
            row["kept_bytes"] = _kept_bytes(one, rank)
            row["simulated_bubble"] = _simulated_bubble(one)
        print(report(name, rows[name], tokens), flush=True)
    after = measured(alone, 1, options.steps, plain=True)
    print(f"plain PyTorch, 1 process, again: {_speed(after, tokens)}\n", flush=True)
    print(table(rows, (step_seconds(before) + step_seconds(after)) / 2, tokens))
    return 0


def _calibration(arguments: list[str]) -> Path | None:
    """The file of `--calibrate`. Raises ConfigError if there are other arguments."""
    parser = ArgumentParser("benchmark_step.py", add_help=False)
    parser.add_argument("--calibrate", metavar="FILE")
    options, others = parser.parse_known_args(arguments)
    if options.calibrate is None:
        return None
    if others:
        raise ConfigError(f"--calibrate: {options.calibrate}: not allowed with {others[0]}")
    return Path(options.calibrate)


@dataclass(frozen=True)
class BenchmarkCase:
    """A layout and its config, under the name that the user gave it."""

    name: str
    layout: Layout
    config: Config

    @classmethod
    def parse(cls, text: str, file: str, overrides: list[str]) -> "BenchmarkCase":
        """Parses `LAYOUT` or `LAYOUT KEY=VALUE …`. Raises ConfigError if it is neither."""
        layout, *own = text.split() or [""]
        return cls(
            " ".join([layout, *own]), Layout.parse(layout), load_config(file, [*overrides, *own])
        )


def _kept_bytes(config: Config, rank: int) -> int:
    """Predicted bytes that a rank keeps for backward (plan/activations.py)."""
    spec = read_spec(config.model)
    return predicted_activations(config, spec, grid_at(config, rank)).bytes


def _simulated_bubble(config: Config) -> float:
    """The simulated bubble of the pipe axis, from the schedule's program and the costs of its chunks."""
    return plan_of(config, read_spec(config.model)).report(config.accumulation_steps).bubble


def measured(
    config: Config, world_size: int, steps: int, plain: bool = False
) -> list[dict[str, Any]]:
    """The measurements of each rank, in the order of ranks."""
    with tempfile.TemporaryDirectory(prefix="benchmark_step_") as folder:
        request = Path(folder) / "request.json"
        request.write_text(
            json.dumps(
                {"config": config.to_json(), "steps": steps, "plain": plain, "folder": folder}
            )
        )
        run_local_ranks(world_size, RANK_MODULE, [str(request)])
        return [
            json.loads((Path(folder) / f"rank{rank}.json").read_text())
            for rank in range(world_size)
        ]


def step_seconds(ranks: list[dict[str, Any]]) -> float:
    """Median over the steps of the slowest rank's time."""
    return median(max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True))


def _speed(ranks: list[dict[str, Any]], tokens: int) -> str:
    seconds = step_seconds(ranks)
    return f"{seconds:.4g} s per step, {tokens / seconds:,.0f} tokens/s"


def _megabytes(ranks: list[dict[str, Any]], name: str) -> str:
    return " ".join(f"{rank[name] / MEGABYTE:.4g}" for rank in ranks)


def report(name: str, ranks: list[dict[str, Any]], tokens: int) -> str:
    """A layout's figures, rank by rank."""
    lines = [f"{name}: {_speed(ranks, tokens)}", split_line(ranks)]
    lines += [
        f"    {kind.removesuffix('_bytes'):9} MB by rank: {_megabytes(ranks, kind)}"
        for kind in STATES
    ]
    lines.append(f"    kept      MB by rank: {_megabytes(ranks, 'kept_bytes')}")
    lines.append(f"    peak      MB by rank: {_megabytes(ranks, 'peak_bytes')}")
    if ranks[0]["simulated_bubble"] > 0:
        measured = " ".join(f"{100 * rank['bubble']:.1f}" for rank in ranks)
        simulated = f"on average; simulated {100 * ranks[0]['simulated_bubble']:.1f}"
        average = 100 * sum(rank["bubble"] for rank in ranks) / len(ranks)
        lines.append(f"    pipeline bubble, % by rank: {measured}; {average:.1f} {simulated}")
    for axis in sorted({axis for rank in ranks for axis in rank["waits"]}):
        waits = " ".join(f"{1e3 * rank['waits'].get(axis, 0.0):.3g}" for rank in ranks)
        lines.append(f"    waited for {axis}, ms per step by rank: {waits}")
    for axis in sorted({axis for rank in ranks for axis in rank["sent"]}):
        sent = " ".join(f"{rank['sent'].get(axis, 0) / MEGABYTE:.4g}" for rank in ranks)
        lines.append(f"    sent over {axis}, MB per step by rank: {sent}")
    return "\n".join(lines)


def split_line(ranks: list[dict[str, Any]]) -> str:
    """Shares of the step's time by kind of work, averaged over the ranks; the rest is Python, hooks and waits outside
    operators."""
    whole = sum(median(rank["seconds"]) for rank in ranks)
    kinds = {kind for rank in ranks for kind in rank["split"]}
    shares = {kind: sum(rank["split"].get(kind, 0.0) for rank in ranks) / whole for kind in kinds}
    words = [
        f"{kind} {100 * shares[kind]:.1f}"
        for kind in sorted(kinds, key=lambda kind: shares[kind], reverse=True)
    ]
    rest = max(0.0, 1 - sum(shares.values()))
    return f"    share of the step, %: {', '.join(words)}, rest {100 * rest:.1f}"


def table(rows: dict[str, list[dict[str, Any]]], plain_seconds: float, tokens: int) -> str:
    """One line per layout, with memory and sent bytes of the rank that has the most. kept: predicted, for backward."""
    width = max(map(len, [*rows, "layout"]))
    crossed = {axis for ranks in rows.values() for rank in ranks for axis in rank["sent"]}
    axes = [axis for axis in AXES if axis in crossed]
    columns = (
        "seconds",
        "tokens/s",
        "of plain",
        "states MB",
        "kept MB",
        "peak MB",
        *(f"{axis} MB" for axis in axes),
    )
    lines = [f"{'layout':{width}}" + "".join(f"  {column:>9}" for column in columns)]
    for name, ranks in rows.items():
        seconds = step_seconds(ranks)
        bytes_held = [max(sum(rank[kind] for kind in STATES) for rank in ranks)]
        bytes_held += [max(rank[kind] for rank in ranks) for kind in ("kept_bytes", "peak_bytes")]
        bytes_sent = [max(rank["sent"].get(axis, 0) for rank in ranks) for axis in axes]
        line = f"{name:{width}}  {seconds:9.4g}  {tokens / seconds:9,.0f}  {plain_seconds / seconds:9.3f}"
        lines.append(
            line + "".join(f"  {size / MEGABYTE:9.4g}" for size in (*bytes_held, *bytes_sent))
        )
    return "\n".join(lines)
