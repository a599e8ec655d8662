"""about.json, which a run writes at its start for report.html: facts that only the page needs, or that need torch or
the planner. The config itself is in config.json."""

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megalite.config import Config
from megalite.model.spec import TransformerSpec
from megalite.pipeline.pipeline_plan import PipelinePlan, plan_of
from megalite.plan.states import (
    grid_at,
    parameter_sizes,
    predicted_activations,
    predicted_states,
)
from megalite.programs.check import check
from megalite.topology.axes import AxisSizes

SHOWN_ROUNDS = 4  # micro-batches per pipe rank in the step that is drawn


def about(config: Config, spec: TransformerSpec) -> dict[str, Any]:
    """The content of about.json for a resolved config."""
    return {
        "model": spec.family,
        "causal": spec.causal,
        "parameters": spec.num_parameters,
        "loss_unit": "nats per text" if spec.labels else "nats per token",
        "grid": axes_of(config),
        "predicted": predicted_bytes(config, spec),
        "pipeline": _pipeline(plan_of(config, spec), config.accumulation_steps),
        "differing": differing(config.document),
    }


def axes_of(config: Config) -> dict[str, int]:
    """Sizes of the axes, outermost first; `context` only if it has several ranks."""
    parallel = config.parallel
    return AxisSizes(parallel.pipe, config.data_size, parallel.context, parallel.tensor).axes


def predicted_bytes(config: Config, spec: TransformerSpec) -> list[dict[str, int]]:
    """Predicted bytes of each rank, by kind."""
    result = []
    by_coordinates: dict[tuple[int, int], Any] = {}
    for rank in range(config.world_size):
        grid = grid_at(config, rank)
        coordinates = grid.pipe.rank, grid.tensor.rank
        if coordinates not in by_coordinates:  # neither depends on the data and context axes
            kept = predicted_activations(config, spec, grid).bytes
            by_coordinates[coordinates] = parameter_sizes(config, spec, grid), kept
        sizes, kept = by_coordinates[coordinates]
        states = predicted_states(config, sizes, grid)
        result.append(
            {
                "weights_bytes": states.weights,
                "gradients_bytes": states.gradients,
                "optimizer_bytes": states.optimizer,
                "activations_bytes": kept,
                "buckets_bytes": states.buckets,
            }
        )
    return result


def _pipeline(plan: PipelinePlan, micro_batches: int) -> dict[str, Any]:
    """The program of a step with its simulated times. A step with many micro-batches is drawn shortened; the bubble is
    that of the whole step."""
    if plan.pipe == 1:
        return {}
    shown = min(micro_batches, SHOWN_ROUNDS * plan.pipe)
    program, cost = plan.program(shown), plan.cost
    ends = check(program, cost).ends
    length = max(ends.values())
    actions = [
        [
            [
                *action,
                (ends[action] - cost(action.kind, action.chunk)) / length,
                ends[action] / length,
            ]
            for action in own
        ]
        for own in program.actions
    ]
    return {
        "schedule": plan.schedule,
        "micro_batches": micro_batches,
        "shown_micro_batches": shown,
        "chunks": len(plan.cut.home) // plan.pipe,
        "layers": [len(layers) for layers in plan.cut.layers],
        "bubble": plan.report(micro_batches).bubble,
        "actions": actions,
    }


def differing(section: BaseModel, path: str = "") -> list[list[Any]]:
    """Keys whose value is not the default, as [key, value, default]; the default is None if there is none."""
    found: list[list[Any]] = []
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{path}{field.alias or name}"
        if value is None:
            continue
        if isinstance(value, BaseModel):
            found += differing(value, f"{key}.")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = section.model_dump(include={name}, exclude_none=True).get(name)
        if default is PydanticUndefined:
            found.append([key, shown, None])
        elif value != default:
            default = default.model_dump() if isinstance(default, BaseModel) else default
            found.append([key, shown, default])
    return found
