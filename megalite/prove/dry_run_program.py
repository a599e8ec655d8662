"""`tools/dry_run.py`: tries a run of any number of ranks in one CPU process, before any GPU is needed.

python tools/dry_run.py --deepspeed_config FILE --world-size N [--memory-gib G] [--messages] [--json] [KEY=VALUE …]

Three levels: ranks and schedule (plan/places.py), and with `--messages` the real step of every rank of a shrunken
model (messages.py). docs/planning.md describes what each finds.
"""

import json
import resource
import time
import warnings

from megalite.config import check_model, load_config
from megalite.inputs import reading
from megalite.model.families import read_spec
from megalite.model.parameter_groups import check_parameter_groups
from megalite.plan.device_figures import GIB
from megalite.plan.places import DryRun, dry_run
from megalite.ranks.arguments import ArgumentParser, at_least, positive
from megalite.ranks.launch import quiet
from megalite.ranks.place import MOST_RANKS


def main(arguments: list[str]) -> int:
    """Prints the result; returns 0. Raises DryRunError with one line if a run would not work (exit code 1), and
    UserError for a mistake in the config."""
    parser = ArgumentParser(description="Try a run of many ranks in one process.")
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
        "--memory-gib",
        type=positive,
        metavar="G",
        help="memory of a device: checks that each rank fits",
    )
    parser.add_argument(
        "--messages",
        action="store_true",
        help="match every collective and message of a step of a shrunken model",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for launcher/pretrain.py"
    )
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FutureWarning)  # torch's, about names of collectives
    start = time.perf_counter()
    with reading(options.deepspeed_config):
        config = load_config(options.deepspeed_config, options.overrides)
        config = config.resolve(options.world_size)
        spec = read_spec(config.model)
        check_model(config, spec)
        check_parameter_groups(config, spec)
    memory = None if options.memory_gib is None else options.memory_gib * GIB
    found = dry_run(config, spec, memory)
    if options.messages:
        from megalite.prove.messages import calls_of_all, match, shrunken  # imports DeepSpeed

        with quiet():
            found.matched = match(calls_of_all(shrunken(config)))
    if options.json:
        print(json.dumps(found.json()), flush=True)
        return 0
    print("\n".join(lines(found, options.memory_gib)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    seconds = time.perf_counter() - start
    print(f"{options.world_size:,} ranks in {seconds:.1f} s and {peak:.0f} MiB in one process")
    return 0


def lines(found: DryRun, memory_gib: float | None) -> list[str]:
    """The lines printed without `--json`."""
    result = []
    for place in found.places:
        chunks = "; ".join(
            f"layers {layers[0]}-{layers[-1]}" if layers else "the head" for layers in place.layers
        )
        sent = ", ".join(f"{axis} {size / 1e6:,.4g} MB" for axis, size in place.sent.items())
        result_of_step = f"forward and backward work; a micro-batch sends {sent or 'nothing'}"
        if found.experts:
            result_of_step = "forward and backward not tried, since it has experts"
        result.append(
            f"ranks {place.rank}-{place.rank + place.ranks - 1}: {chunks}: "
            f"{place.memory.total / GIB:.2f} GiB, {result_of_step}"
        )
    if memory_gib is not None:
        result.append(f"every rank fits in {memory_gib:g} GiB")
    if len(found.places) > 1:
        result.append(
            f"schedule {found.schedule}: complete, and its {found.pipe_messages:,} messages per step cannot hang; "
            f"bubble {100 * found.bubble:.1f} % with {found.micro_batches} micro-batches"
        )
    if found.matched:
        result.append(
            f"messages of {found.matched['ranks']} ranks of a shrunken model: {found.matched['collectives']} "
            f"collectives and {found.matched['messages']} messages match"
        )
    return result
