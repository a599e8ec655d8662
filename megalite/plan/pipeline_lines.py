"""What `--check` and the start of a run print about the pipeline."""

from megalite.pipeline.pipeline_plan import PipelinePlan
from megalite.programs.check import most_bytes


def pipeline_lines(plan: PipelinePlan, micro_batches: int) -> list[str]:
    """A line with the schedule and its bubble, then one for each pipe rank; empty if there is only one."""
    if plan.pipe == 1:
        return []
    report, program = plan.report(micro_batches), plan.program(micro_batches)
    bubble = f"bubble {100 * report.bubble:.1f} % of a step with {micro_batches} micro-batches, simulated"
    lines = [f"pipeline: schedule {plan.schedule}, {bubble}"]
    for rank in range(plan.pipe):
        most = most_bytes(
            program, rank, lambda chunk: max(1, len(plan.cut.layers[chunk])), lambda chunk: 0
        )
        parts = [
            f"{_words(plan, chunk)}, {_counted(held, 'micro-batch', 'micro-batches')} held"
            for chunk, (held, _) in most.counts.items()
        ]
        if report.waiting[rank]:
            waiting = _counted(
                report.waiting[rank], "weight gradient waits", "weight gradients wait"
            )
            parts.append(f"up to {waiting}")
        parts.append(f"busy {100 * report.busy[rank] / report.length:.1f} %")
        lines.append(f"    pipe {rank}: {'; '.join(parts)}")
    return lines


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _words(plan: PipelinePlan, chunk: int) -> str:
    """The layers of a chunk, and the head if it has it."""
    layers = plan.cut.layers[chunk]
    words = []
    if layers:
        words.append(
            f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        )
    if chunk == plan.cut.last_chunk:
        words.append("head")
    return " and ".join(words)
