"""`tools/plan.py`: which layout to use on a number of ranks, its memory and time, and why.

python tools/plan.py --deepspeed_config FILE --world-size N [--device NAME] [--memory-gib G] [--json] [KEY=VALUE …]

Starts no rank and needs no device. The pieces: candidates.py (what is tried), rank_memory.py and step_time.py (what it
costs), search.py (which are the best), advice.py (why).
"""

import json
from dataclasses import replace
from pathlib import Path

from megalite.config import Config, load_config
from megalite.data.loader import epochs_of
from megalite.errors import ConfigError
from megalite.inputs import reading
from megalite.model.families import read_spec
from megalite.model.spec import TransformerSpec
from megalite.plan.advice import changes, given_line, none_fits, why
from megalite.plan.candidates import Search, given_candidate
from megalite.plan.device_figures import GIB, Device, device_of, known_device, read_device
from megalite.plan.search import Found, PlannedLayout, Planner
from megalite.plan.work import PARTS
from megalite.ranks.arguments import ArgumentParser, at_least, positive
from megalite.ranks.garbage import collect_garbage, hold_garbage
from megalite.ranks.place import MOST_RANKS

DEFAULT_DEVICE = "H100"
BAR = 60  # characters of the longest bar
LETTERS = {**dict(zip(PARTS, "PAMRTEDXC", strict=True)), "update": "U", "bubble": "."}
LEGEND = (
    "P products, A attention, M memory-bound work, R recomputed forwards, T messages of the tensor axis, E summing "
    "gradients, D messages of the data axis, X messages of the expert axis, C messages of the context axis, "
    "U update, . bubble"
)


def main(arguments: list[str]) -> int:
    """Prints the best layouts; returns 0. Raises UserError with one line, also if none fits."""
    parser = ArgumentParser(description="Find the best layout for a number of ranks.")
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="FILE", help="the JSON of the run"
    )
    parser.add_argument(
        "--world-size",
        type=at_least(1, MOST_RANKS),
        required=True,
        metavar="N",
        help="number of ranks",
    )
    parser.add_argument(
        "--device",
        default=DEFAULT_DEVICE,
        metavar="NAME",
        help=f"one of docs/planning.md, or a file of benchmark_step.py --calibrate (default: {DEFAULT_DEVICE})",
    )
    parser.add_argument(
        "--memory-gib", type=positive, metavar="G", help="memory of a device (default: all of it)"
    )
    parser.add_argument(
        "--gpus-per-node", type=at_least(1), metavar="N", help="devices per node (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for launcher/pretrain.py"
    )
    options = parser.parse_args(arguments)
    device = device_of(options.device)
    if options.gpus_per_node is not None:
        device = replace(device, node_ranks=options.gpus_per_node)
    memory = device.rank_memory_bytes(options.world_size)
    memory = memory if options.memory_gib is None else options.memory_gib * GIB
    with reading(options.deepspeed_config):
        config = load_config(options.deepspeed_config, options.overrides)
        hold_garbage()  # reading the model imports transformers
        planner, given = planner_of(config, options.world_size, device, memory)
        collect_garbage()
        found = planner.find()
        if not found.layouts:
            raise none_fits(planner)
    if options.json:
        print(json.dumps(as_json(planner, found, given)), flush=True)
    else:
        print("\n".join(lines(planner, found, given)), flush=True)
    return 0


def planner_of(
    config: Config, world_size: int, device: Device, memory_bytes: float
) -> tuple[Planner, PlannedLayout | None]:
    """The planner of a config that is not resolved, and the config's own layout if the rules accept it for these
    ranks."""
    spec = read_spec(config.model)
    if spec.stacks is not None:
        rule = "the planner does not know the times of an encoder-decoder"
        raise ConfigError(f"megalite.model.model_type: {spec.family!r}: {rule}")
    batch, resolved = config.document.train_batch_size, None
    try:
        resolved = config.resolve(world_size)
    except ConfigError:
        if batch is None:
            raise  # the global batch follows from the config's own layout
    if batch is None:
        assert resolved is not None
        batch = resolved.train_batch_size
    planner = Planner(Search(config, spec, world_size, batch), device, memory_bytes)
    if resolved is None:
        return planner, None
    return planner, planner.layout(resolved, given_candidate(resolved))


def as_json(planner: Planner, found: Found, given: PlannedLayout | None) -> dict[str, object]:
    """The object that `--json` prints (docs/planning.md)."""
    return {
        "device": planner.device.name,
        "world_size": planner.search.world_size,
        "memory_bytes": int(planner.memory_bytes),
        "accepted": found.accepted,
        "weighed": found.weighed,
        "layouts": [layout.json() for layout in found.layouts],
        "given": None if given is None else given.json(),
    }


def lines(planner: Planner, found: Found, given: PlannedLayout | None) -> list[str]:
    """The lines printed without `--json`."""
    search, device = planner.search, planner.device
    size = search.spec.num_parameters
    result = [
        f"{size / 1e9:.3g} B parameters, {search.batch:,} samples of {search.config.data.sequence_length:,} tokens per "
        f"step, {search.world_size:,} ranks of {device.name} with {planner.memory_bytes / GIB:.1f} GiB "
        f"({device.node_ranks} per node)",
        f"the config's rules accept {found.accepted:,} layouts; {found.weighed:,} of them were simulated in full, "
        "the others are slower or do not fit",
        "",
        *table(planner, found.layouts),
        "",
        *picture(found.layouts),
        "",
        why(found.layouts),
    ]
    result += changes(planner, found)
    if given is not None:
        result.append(given_line(given, found.layouts[0], planner.memory_bytes))
    keys = found.layouts[0].candidate.keys
    return [*result, "", " ".join(_override(key, value) for key, value in keys.items())]


def _override(key: str, value: object) -> str:
    if key.endswith("offload_optimizer.device"):
        key, value = (key, value) if value != "none" else (key.removesuffix(".device"), None)
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def table(planner: Planner, layouts: list[PlannedLayout]) -> list[str]:
    """One line per layout."""
    names = [str(layout.candidate) for layout in layouts]
    width = max(map(len, names))
    columns = ("data", "steps", "s/step", "bubble", "TFLOP/s", "of peak", "GiB", "GB sent")
    result = [f"    {'layout':{width}}" + "".join(f"  {column:>8}" for column in columns)]
    for number, (name, layout) in enumerate(zip(names, layouts, strict=True), 1):
        flops = model_flops(planner, layout)
        peak = planner.device.half_flops
        peak = peak if planner.dtype_bytes == 2 else planner.device.single_flops
        figures = (
            f"{layout.config.data_size:>8}  {layout.micro_batches:>8}  {layout.time.seconds:8.4g}  "
            f"{100 * layout.time.bubble:6.1f} %  {flops / 1e12:8.4g}  {100 * flops / peak:6.1f} %  "
            f"{layout.memory.total / GIB:8.2f}  {sum(layout.sent.values()) / 1e9:8.3g}"
        )
        result.append(f"{number:2}  {name:{width}}  {figures}")
    return result


def model_flops(planner: Planner, layout: PlannedLayout) -> float:
    """FLOP/s per rank that the model needs, without recomputation (training/mfu.py)."""
    search, data = planner.search, planner.search.config.data
    tokens = search.batch * data.sequence_length
    needed = search.spec.flops_per_token(data.sequence_length, data.counted_share)
    return tokens * needed / layout.time.seconds / search.world_size


def picture(layouts: list[PlannedLayout]) -> list[str]:
    """One bar per layout, as long as its step, divided by what the time is spent on."""
    longest = max(layout.time.seconds for layout in layouts)
    result = []
    for number, layout in enumerate(layouts, 1):
        bar, spent = "", 0.0
        for name, letter in LETTERS.items():
            spent += layout.time.parts[name]
            bar += letter * (round(BAR * spent / longest) - len(bar))
        result.append(f"{number:2}  {bar}")
    return [*result, f"    {LEGEND}"]


def plan_line(config: Config) -> str:
    """What `--check` prints about the layout of a resolved config, on its calibrated device or the default one."""
    path = config.train.calibration
    device = (
        known_device(DEFAULT_DEVICE)
        if path is None
        else read_device(Path(path), "megalite.train.calibration")
    )
    planner, given = planner_of(config, config.world_size, device, device.memory_bytes)
    assert given is not None
    flops = model_flops(planner, given)
    return (
        f"plan: on {device.name} {given.time.seconds:.4g} s per step predicted, {flops / 1e12:.3g} TFLOP/s per rank, "
        f"bubble {100 * given.time.bubble:.1f} %, {given.memory.total / GIB:.2f} GiB on rank {given.memory.rank}; "
        f"tools/plan.py compares layouts"
    )


def epochs_line(config: Config, spec: TransformerSpec) -> str:
    """How many epochs of each corpus a run reads."""
    assert config.train.steps is not None, "a run knows its steps when it starts"
    samples = config.batch_plan.consumed(config.train.steps)
    epochs = epochs_of(config.data, config.train.seed, spec.vocabulary_size, samples)
    told = ", ".join(f"{count:.3g} of {path}" for path, count in epochs)
    return f"epochs: {told}"


def size_line(config: Config, spec: TransformerSpec) -> str:
    """Parameters, tokens and FLOPs of a run; only parameters if its steps follow from epochs."""
    data, steps = config.data, config.train.steps
    if steps is None:
        return f"{spec.num_parameters:,} parameters; {config.train.epochs:g} epochs"
    tokens = config.batch_plan.consumed(steps) * data.sequence_length
    length, counted = data.sequence_length, data.counted_share
    flops = tokens * spec.flops_per_token(length, counted, data.source_length)
    return (
        f"{spec.num_parameters:,} parameters; {tokens:,} tokens in {steps:,} steps, "
        f"{tokens / spec.num_parameters:.3g} per parameter; {flops:.3g} FLOPs"
    )
