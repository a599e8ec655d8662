"""The pipeline of a run: its schedule, its cut of the layers, and its program for a number of micro-batches.

Everything follows from config and model, so all ranks agree without communication. Next: mailbox.py.
"""

from dataclasses import dataclass, replace
from functools import cache

from megalite.config import Config
from megalite.model.chunks import Cut, layers_of
from megalite.model.spec import TransformerSpec
from megalite.pipeline.cut import ModelCosts, cut_by_cost
from megalite.pipeline.steps import Step, check_steps, steps_of
from megalite.programs.check import Cost, Report, check
from megalite.programs.program import Program
from megalite.programs.schedules import forward_only, home_of, make_program, straight

SEARCH_ROUNDS = 2  # micro-batches per pipe rank in the programs by which cuts are compared


@dataclass(frozen=True)
class PipelinePlan:
    """schedule: its name. pipe: size of the axis. chunks: per rank, for `interleaved`. costs: of the model."""

    schedule: str
    pipe: int
    chunks: int
    cut: Cut
    costs: ModelCosts

    @property
    def cost(self) -> Cost:
        """The cost of each action, in multiply-adds per token."""
        return self.costs.of_chunks([len(layers) for layers in self.cut.layers])

    def program(self, micro_batches: int) -> Program:
        """The program of a training step."""
        return _training(self, micro_batches)

    def report(self, micro_batches: int) -> Report:
        """The costs of a training step on the simulated clock."""
        return check(self.program(micro_batches), self.cost)

    def steps(self, micro_batches: int, rank: int) -> list[Step]:
        """A rank's steps in training, checked."""
        return _training_steps(self, micro_batches)[rank]

    def evaluation_steps(self, micro_batches: int, rank: int) -> list[Step]:
        """A rank's steps in an evaluation, checked."""
        return _evaluation_steps(self.cut.home, micro_batches)[rank]


@cache
def _training(plan: PipelinePlan, micro_batches: int) -> Program:
    return make_program(plan.schedule, plan.pipe, micro_batches, plan.chunks, plan.cost)


@cache
def _training_steps(plan: PipelinePlan, micro_batches: int) -> list[list[Step]]:
    steps = steps_of(plan.program(micro_batches), plan.cost)
    check_steps(steps)
    return steps


@cache
def _evaluation_steps(home: tuple[int, ...], micro_batches: int) -> list[list[Step]]:
    steps = steps_of(forward_only(home, micro_batches))
    check_steps(steps)
    return steps


def plan_of(config: Config, spec: TransformerSpec) -> PipelinePlan:
    """The pipeline of a training run, from its resolved config."""
    parallel, length = config.parallel, config.data.sequence_length
    recomputes = config.train.activation_checkpointing not in ("none", "selective")
    counts = None if parallel.cut == "cost" else tuple(parallel.cut)
    data = config.data
    costs = ModelCosts.of(spec, length, recomputes, data.counted_share, data.source_length)
    return make_plan(parallel.schedule, parallel.pipe, parallel.chunks_a_rank, counts, costs)


@cache
def make_plan(
    schedule: str, pipe: int, chunks: int, counts: tuple[int, ...] | None, costs: ModelCosts
) -> PipelinePlan:
    """counts: layers of each chunk; None for the cut with the shortest simulated step."""
    home = home_of(schedule, pipe, chunks)
    if counts is not None:
        cut = Cut(home, layers_of(counts))
    else:
        rounds = SEARCH_ROUNDS * pipe
        cut = cut_by_cost(
            costs, home, lambda cost: make_program(schedule, pipe, rounds, chunks, cost)
        )
    return PipelinePlan(schedule, pipe, chunks, cut, costs)


def inference_cut(spec: TransformerSpec, pipe: int) -> Cut:
    """One chunk per rank, for forwards only: the longest chunk is as short as possible."""
    length, source = (1, 0) if spec.stacks is None else (2, 1)  # as many source as target tokens
    costs = ModelCosts.of(spec, length, recomputes=False, source=source)
    # In training the loss also computes the head's two gradients, each as costly as its forward.
    costs = replace(costs, head=costs.head / 3)
    home = straight(pipe)
    return cut_by_cost(costs, home, lambda cost: forward_only(home, SEARCH_ROUNDS * pipe))
