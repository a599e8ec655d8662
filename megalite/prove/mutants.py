"""Faults that verify_layouts must find, derived from a run's kinds of parameters, its axes and its messages.
`verify_layouts.py --mutants N` plants them one by one in a layout and reports how many it found.

They are bugs that trainers have had, such as gradients scaled by the tokens of their own micro-batch
(pytorch/torchtitan#2972); a norm that omits tensors or is computed per group (NVIDIA/Megatron-LM#5916,
NVIDIA-NeMo/Automodel#3816) or counts tensors twice (NVIDIA-NeMo/Megatron-Bridge#5411); sums over ranks that are missing
or computed twice; a tied copy that is stale after resuming; data of another rank or micro-batch
(NVIDIA/Megatron-LM#7452).

A mutant is a name and a Plant (trace.py). The list depends only on the config, so every rank has the same one. Each
file `*_mutants.py` has those of one part of a run. Next: verify.py.
"""

from collections.abc import Mapping

from megalite.config import Config
from megalite.model.families import read_spec
from megalite.plan.states import grid_at
from megalite.prove.context_mutants import of_the_context_axis
from megalite.prove.expert_mutants import of_experts
from megalite.prove.parameter_mutants import of_parameters
from megalite.prove.pipe_mutants import of_the_pipe
from megalite.prove.resume_mutants import of_resuming
from megalite.prove.step_mutants import of_the_step
from megalite.prove.tensor_mutants import of_the_tensor_axis
from megalite.prove.trace import Plant


def mutants(config: Config) -> dict[str, Plant]:
    """Every mutant of a layout's resolved config, by name."""
    grid = grid_at(config, 0)
    result = dict(of_parameters(config, grid))
    result |= dict(of_the_step(config, grid))
    result |= dict(of_resuming())
    if grid.pipe.size > 1:
        result |= dict(of_the_pipe(config))
    if grid.tensor.size > 1:
        result |= dict(of_the_tensor_axis(config))
    if grid.context.size > 1:
        result |= dict(of_the_context_axis(config))
    result |= dict(of_experts(config, read_spec(config.model), grid))
    return result


def chosen(plants: Mapping[str, Plant], count: int) -> list[str]:
    """`count` of the names: one for each function that plants faults, then others, spaced evenly over the rest."""
    by_function: dict[str, str] = {}
    for name, plant in plants.items():
        by_function.setdefault(plant.__qualname__, name)
    first = list(by_function.values())[:count]
    rest = [name for name in plants if name not in first]
    more = min(count - len(first), len(rest))
    return first + [rest[number * len(rest) // more] for number in range(more)]
