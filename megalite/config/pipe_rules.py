"""The rules of the pipe axis: schedule and chunks against the size of the axis, the micro-batches and the layers.

Each raises ConfigError with one line. Called by rules.py.
"""

from megalite.config.batch_plan import BatchPlan
from megalite.config.parallel_keys import Parallel
from megalite.config.section import broken
from megalite.programs.schedules import SCHEDULES

PATH = "megalite.parallel"


def check_schedule_of_pipe(parallel: Parallel) -> None:
    """Rules that need neither the world size nor the model."""
    schedule, pipe, chunks = parallel.schedule, parallel.pipe, parallel.chunks
    if pipe == 1 and schedule != "1f1b":
        raise broken(f"{PATH}.schedule", schedule, f"needs {PATH}.pipe of 2 or more")
    fixed = SCHEDULES[schedule].chunks
    if chunks is not None and fixed == 1:
        names = " or ".join(f'"{name}"' for name, one in SCHEDULES.items() if one.chunks is None)
        raise broken(f"{PATH}.chunks", chunks, f"needs {PATH}.schedule {names}")
    if chunks is not None and fixed not in (None, chunks):
        raise broken(f"{PATH}.chunks", chunks, f'must be {fixed} with {PATH}.schedule "{schedule}"')
    if parallel.cut != "cost":
        needed = pipe * parallel.chunks_a_rank
        if len(parallel.cut) != needed:
            rule = f"must have {needed} numbers: {PATH}.pipe {pipe} × {parallel.chunks_a_rank} chunks per rank"
            raise broken(f"{PATH}.cut", parallel.cut, rule)
        if 0 in parallel.cut[:-1]:
            raise broken(
                f"{PATH}.cut",
                parallel.cut,
                "must have at least 1 layer in every chunk but the last",
            )


def check_micro_batches(parallel: Parallel, plan: BatchPlan, micro: int, data: int) -> None:
    """Some schedules work on groups of as many micro-batches as the pipe axis has ranks."""
    if not SCHEDULES[parallel.schedule].whole_groups:
        return
    unit = micro * data * parallel.pipe
    factors = f"train_micro_batch_size_per_gpu {micro} × data axis {data} × {PATH}.pipe {parallel.pipe} = {unit}"
    rule = f'must be a multiple of {factors} with {PATH}.schedule "{parallel.schedule}"'
    sizes = {"train_batch_size": plan.full}
    if plan.ramp is not None:
        sizes |= {
            "megalite.train.batch_ramp.start": plan.ramp.start,
            "megalite.train.batch_ramp.increment": plan.ramp.increment,
        }
    for key, size in sizes.items():
        if size % unit:
            raise broken(key, size, rule)


def check_layers(parallel: Parallel, layers: int) -> None:
    """Every chunk but the last needs a layer."""
    a_rank = parallel.chunks_a_rank
    chunks = parallel.pipe * a_rank
    if chunks > layers + 1:
        product = f"times {a_rank} chunks per rank = {chunks}: " if a_rank > 1 else ""
        rule = f"{product}must be at most num_hidden_layers + 1 (the head) = {layers + 1}"
        raise broken(f"{PATH}.pipe", parallel.pipe, rule)
    if parallel.cut != "cost" and sum(parallel.cut) != layers:
        total = sum(parallel.cut)
        raise broken(
            f"{PATH}.cut", parallel.cut, f"sums to {total}: must sum to num_hidden_layers {layers}"
        )
