"""All memory of a rank, and which rank has most. Model states and activations are exact (states.py, activations.py);
what is beside them is counted here, and what a device's libraries take is an assumption (devices.py).

Next: candidates.py.
"""

from dataclasses import dataclass
from functools import cached_property

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.model.chunks import Cut
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.pipeline.plan import PipelinePlan, plan_of
from megalite.pipeline.steps import AHEAD
from megalite.plan.activations import Forward
from megalite.plan.devices import FRAGMENTS, GIB, OVERHEAD_BYTES, Device
from megalite.plan.kept import kept_by
from megalite.plan.states import (
    Sizes,
    all_numbers,
    forward_of,
    offloads,
    parameter_sizes,
    persistence_threshold,
    place_of,
    predicted_states,
    recompute_of,
    routed_spec,
)
from megalite.plan.step_time import Held, played_micro_batches

HALF = 2
REUSE_DISTANCE = 10**9  # DeepSpeed's default (runtime/zero/config.py)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank's device. messages: of the pipe axis, under way; gathered: of ZeRO-3's weights while they are
    used; libraries: an assumption."""

    rank: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    messages: int
    gathered: int
    libraries: int

    @property
    def total(self) -> int:
        """Of all."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """By what they are for."""
        return {name: value for name, value in vars(self).items() if name != "rank"}


class SizesByPlace:
    """Numbers of the parameters of a rank's stage by what its chunks are, since most ranks of a pipe axis hold the
    same: a stage on the meta device takes milliseconds a layer."""

    def __init__(self) -> None:
        self._known: dict[object, Sizes] = {}

    def of(self, config: Config, spec: TransformerSpec, plan: PipelinePlan, rank: int) -> Sizes:
        """Of a rank of the pipe axis that has the largest share of the tensor axis."""
        cut, tensor, expert = plan.cut, config.parallel.tensor, config.parallel.expert
        key = tensor, expert, _alike(config, spec, cut, rank)
        if key not in self._known:
            last = (rank + 1) * expert * tensor - 1
            grid = Grid.at(last, plan.pipe, expert, tensor, expert=expert)
            self._known[key] = parameter_sizes(config, spec, grid)
        return self._known[key]


def _alike(config: Config, spec: TransformerSpec, cut: Cut, rank: int) -> object:
    """What the parameters of a rank depend on."""
    by_name = bool(config.train.parameter_groups)
    chunks = []
    for chunk in cut.chunks_of(rank):
        layers, last = cut.layers[chunk], chunk == cut.last_chunk
        routed = sum(spec.mixture_of(layer) is not None for layer in layers)
        chunks.append((chunk == 0, last, layers if by_name else (len(layers), 0 in layers), routed))
    return len(cut.ends), tuple(chunks)


@dataclass(frozen=True)
class MemoryTable:
    """Of a resolved config: the memory of each rank of the pipe axis, with the largest share of the others."""

    config: Config
    spec: TransformerSpec
    device: Device | None
    sizes: SizesByPlace

    @cached_property
    def plan(self) -> PipelinePlan:
        return plan_of(self.config, self.spec)

    @cached_property
    def at(self) -> Forward:
        kind = None if self.device is None else "cpu" if self.device.cores else "cuda"
        tensor, expert = self.config.parallel.tensor, self.config.parallel.expert
        grid = Grid.at(expert * tensor - 1, 1, expert, tensor, expert=expert)
        return forward_of(self.config, grid, kind)

    @cached_property
    def weights(self) -> list[Held]:
        """Numbers of each rank of the pipe axis."""
        ranks = range(self.plan.pipe)
        held = [self.sizes.of(self.config, self.spec, self.plan, rank) for rank in ranks]
        return [_held(sizes, self.config.parallel.expert) for sizes in held]

    @cached_property
    def ranks(self) -> list[RankMemory]:
        """By place on the pipe axis."""
        return [self._rank(rank) for rank in range(self.plan.pipe)]

    @property
    def largest(self) -> RankMemory:
        """The rank that has most."""
        return max(self.ranks, key=lambda held: held.total)

    def _rank(self, pipe_rank: int) -> RankMemory:
        config, spec, plan = self.config, self.spec, self.plan
        sizes = self.sizes.of(config, spec, plan, pipe_rank)
        copies, tensor = config.data_size * config.parallel.context, config.parallel.tensor
        # With fp32 and ZeRO the copies hold different gradients: of the parameters that reach into their part.
        by_place = config.precision == "fp32" and config.zero_stage in (1, 2)
        places = range(copies) if by_place else [0]
        grids = [
            place_of(config, (pipe_rank * copies + place) * tensor + tensor - 1) for place in places
        ]
        states = [(predicted_states(config, sizes, grid), grid.rank) for grid in grids]
        most, rank = max(
            states, key=lambda held: held[0].weights + held[0].gradients + held[0].optimizer
        )
        played = played_micro_batches(plan, config.accumulation_steps)
        kept = kept_by(
            routed_spec(config, spec), plan, pipe_rank, recompute_of(config), self.at, played
        )
        neighbours = (pipe_rank > 0) + (pipe_rank < plan.pipe - 1)
        hidden = self.at.hidden(spec)
        numbers = [size for group in sizes for size in group.numbers]
        gathered = (
            self.at.width * _whole_at_once(config, numbers, spec) if config.zero_stage == 3 else 0
        )
        on_host = self.device is not None and not self.device.cores and offloads(config)
        moved = most.gradients - (4 + self.at.width) * all_numbers(sizes) // copies
        return RankMemory(
            rank,
            most.weights,
            max(0, moved) if on_host and config.zero_stage < 3 else most.gradients,
            0 if on_host else most.optimizer,
            most.buckets if self.device is None or not self.device.cores else 0,
            kept.bytes,
            # Receives posted early and sends that are not gone, from each neighbour.
            neighbours * (AHEAD + 1) * hidden,
            gathered if copies > 1 else 0,
            self._libraries(),
        )

    def _libraries(self) -> int:
        if self.device is None or self.device.cores:
            return 0
        return int(OVERHEAD_BYTES + FRAGMENTS * self.device.memory_bytes)


def check_states(config: Config, spec: TransformerSpec, memory_bytes: int) -> None:
    """ConfigError where weights, gradients and optimizer state of a rank alone are more than its device has."""
    weights = config.zero.offload_param
    if weights is not None and weights.device != "none":
        return
    plan, sizes = plan_of(config, spec), SizesByPlace()
    for pipe_rank in range(plan.pipe):
        place = place_of(config, (pipe_rank + 1) * config.world_size // plan.pipe - 1)
        states = predicted_states(config, sizes.of(config, spec, plan, pipe_rank), place)
        needed, what = states.weights, "weights"
        if not offloads(config):
            needed += states.gradients + states.optimizer
            what += ", gradients and optimizer state"
        if needed > memory_bytes:
            rule = (
                f"a GPU here has {memory_bytes / GIB:.1f} (megalite plan finds a layout that fits)"
            )
            raise ConfigError(
                f"world size: {config.world_size}: rank {place.rank} needs {needed / GIB:.1f} GiB for {what}: {rule}"
            )


def _held(sizes: Sizes, expert: int) -> Held:
    """Numbers of a rank, those apart that an expert axis divides."""
    routed = [group for group in sizes if expert > 1 and group.replicas == "expert_replica"]
    count = all_numbers(routed)
    return Held(float(all_numbers(sizes) - count), float(count))


def _whole_at_once(config: Config, numbers: list[int], spec: TransformerSpec) -> int:
    """Numbers of ZeRO-3's weights that are whole at a time beside those that always are.

    At the least a layer, or the embedding where it has more, and another that is gathered meanwhile. But DeepSpeed does
    not drop what is used again soon (runtime/zero/partitioned_param_coordinator.py, __params_to_release): a weight that
    n numbers follow in forward is used again 2n numbers later, in backward.
    """
    layer = max(max(numbers), sum(numbers) // max(1, spec.num_layers))
    distance = config.zero.stage3_max_reuse_distance
    soon = (REUSE_DISTANCE if distance is None else distance) // 2
    dropped = sum(count for count in numbers if count > persistence_threshold(config))
    return max(2 * layer, min(dropped, soon))
