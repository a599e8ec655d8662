"""Faults that verify_layouts must find, made from what a run knows of itself: its kinds of parameters, its axes, its
messages. `verify_layouts.py --mutants N` plants them one by one in a layout and reports how many it found.

They are bugs that layouts really have, among them: gradients scaled by their micro-batch's tokens
(pytorch/torchtitan#2972), a norm that leaves tensors out or that each group takes of its own (NVIDIA/Megatron-LM#5916,
NVIDIA-NeMo/Automodel#3816) or counts twice (NVIDIA-NeMo/Megatron-Bridge#5411), sums over ranks that are missing or made
twice, a tied copy that is stale after a resume, data of another rank or micro-batch (NVIDIA/Megatron-LM#7452).

A mutant is a name and a Plant (trace.py). The list depends only on the config, so every rank has the same one. Each
file `*_mutants.py` has those of one part of a run. Next: verify.py.
"""

from collections.abc import Iterable

from megalite.config import Config
from megalite.model.families import read_spec
from megalite.plan.states import place_of
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
    grid = place_of(config, 0)
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


def chosen(names: Iterable[str], count: int) -> list[str]:
    """So many of the names, spread evenly over all of them."""
    every = list(names)
    count = min(count, len(every))
    return [every[number * len(every) // count] for number in range(count)]
