"""`tools/benchmark_step.py`: step time, memory by rank and bytes sent by axis of several layouts in one run, beside a
plain PyTorch loop with the same model.

The plain loop is one process: on a machine without a GPU it has all cores, which a layout's ranks share; with GPUs it
has one, and a layout one for each rank. It runs before and after the layouts, so that a drift of the machine shows.
"""

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from megalite.config import Config, load_config
from megalite.data.loader import TrainData
from megalite.errors import ConfigError
from megalite.launch import ArgumentParser
from megalite.model.families import read_spec
from megalite.training.layouts import Layout, base_batch, config_of
from megalite.training.local_ranks import check_room, run_local_ranks

RANK_MODULE = "megalite.training.benchmark_rank"
MEGABYTE = 1e6
STATES = ("weights_bytes", "gradients_bytes", "optimizer_bytes")


def main(arguments: list[str]) -> int:
    """Prints the figures; returns 0. Raises UserError with one line."""
    parser = ArgumentParser("benchmark_step.py", description="Measure a training step on several layouts.")
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the JSON of the run")
    parser.add_argument("--layouts", nargs="+", required=True, metavar="LAYOUT", help="pipe=2,tensor=2,data=2,zero=2")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps of each (default: 5)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="a dotted path into the JSON")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise ConfigError(f"--steps: {options.steps}: must be 1 or more")
    layouts = [Layout.parse(text) for text in options.layouts]
    config = load_config(options.deepspeed_config, [*options.set, "megalite.train.batch_ramp=null"])
    batch = base_batch(config, layouts[0])
    configs = {layout: config_of(config, layout, batch) for layout in layouts}
    for layout in layouts:
        check_room(layout.world_size, str(layout))
    # ZeRO-1 only so that the config is valid with bf16: the plain loop has no DeepSpeed.
    alone = config_of(config, Layout(zero=1), batch, offload=False)
    TrainData(alone.data, alone.train.seed, read_spec(alone.model).vocabulary_size)
    tokens = batch * alone.data.sequence_length
    before = _measured(alone, 1, options.steps, plain=True)
    print(f"plain PyTorch, 1 process: {_speed(before, tokens)}, peak {_megabytes(before, 'peak_bytes')} MB", flush=True)
    rows = {}
    for layout in layouts:
        rows[layout] = _measured(configs[layout], layout.world_size, options.steps, plain=False)
        print(report(layout, rows[layout], tokens), flush=True)
    after = _measured(alone, 1, options.steps, plain=True)
    print(f"plain PyTorch, 1 process, again: {_speed(after, tokens)}\n", flush=True)
    print(table(rows, (step_seconds(before) + step_seconds(after)) / 2, tokens))
    return 0


def _measured(config: Config, world_size: int, steps: int, plain: bool) -> list[dict[str, Any]]:
    """What each rank has measured, in the order of ranks."""
    with tempfile.TemporaryDirectory(prefix="benchmark_step_") as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"config": config.to_json(), "steps": steps, "plain": plain, "folder": folder}))
        run_local_ranks(world_size, RANK_MODULE, [str(request)])
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def step_seconds(ranks: list[dict[str, Any]]) -> float:
    """Median over the steps of the slowest rank's time."""
    return median(max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True))


def _speed(ranks: list[dict[str, Any]], tokens: int) -> str:
    seconds = step_seconds(ranks)
    return f"{seconds:.4g} s a step, {tokens / seconds:,.0f} tokens/s"


def _megabytes(ranks: list[dict[str, Any]], name: str) -> str:
    return " ".join(f"{rank[name] / MEGABYTE:.4g}" for rank in ranks)


def report(layout: Layout, ranks: list[dict[str, Any]], tokens: int) -> str:
    """A layout's figures, rank by rank."""
    lines = [f"{layout}: {_speed(ranks, tokens)}"]
    lines += [f"    {name.removesuffix('_bytes'):9} MB by rank: {_megabytes(ranks, name)}" for name in STATES]
    lines.append(f"    peak      MB by rank: {_megabytes(ranks, 'peak_bytes')}")
    for axis in sorted({axis for rank in ranks for axis in rank["sent"]}):
        sent = " ".join(f"{rank['sent'].get(axis, 0) / MEGABYTE:.4g}" for rank in ranks)
        lines.append(f"    sent over {axis}, MB a step by rank: {sent}")
    return "\n".join(lines)


def table(rows: dict[Layout, list[dict[str, Any]]], plain_seconds: float, tokens: int) -> str:
    """A line a layout; memory and bytes of the rank that has most."""
    width = max(len(str(layout)) for layout in rows)
    axes = ("pipe", "data", "tensor", "ends", "other")
    head = f"{'layout':{width}}  {'seconds':>8}  {'tokens/s':>9}  {'of plain':>8}  {'states MB':>9}"
    lines = [head + "".join(f"  {axis + ' MB':>9}" for axis in axes)]
    for layout, ranks in rows.items():
        seconds = step_seconds(ranks)
        states = max(sum(rank[name] for name in STATES) for rank in ranks) / MEGABYTE
        sent = "".join(f"  {max(rank['sent'].get(axis, 0) for rank in ranks) / MEGABYTE:9.4g}" for axis in axes)
        ratio = plain_seconds / seconds
        lines.append(
            f"{str(layout):{width}}  {seconds:8.4g}  {tokens / seconds:9,.0f}  {ratio:8.3f}  {states:9.4g}{sent}"
        )
    return "\n".join(lines)
