"""Peak memory of each rank in a step, and the rank with the most. Model states and activations are exact (states.py,
activations.py), memory_timeline.py finds when they coincide, and the memory of a device's libraries is an assumption
(device_figures.py).

Next: candidates.py.
"""

from dataclasses import dataclass
from functools import cached_property

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.model.chunks import Cut
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.pipeline.pipeline_plan import PipelinePlan, plan_of
from megalite.pipeline.steps import AHEAD
from megalite.plan.activations import Forward
from megalite.plan.device_figures import FRAGMENTS, GIB, OVERHEAD_BYTES, Device
from megalite.plan.gradients import FP32, Moment, Reduction
from megalite.plan.kept import parts_of
from megalite.plan.memory_timeline import ChunkMemory, most_memory
from megalite.plan.sharing import Held
from megalite.plan.states import (
    Sizes,
    States,
    all_numbers,
    bucket_numbers,
    forward_of,
    offload_buffers,
    offloads,
    owned_gradients,
    parameter_sizes,
    partition_sizes,
    persistence_threshold,
    place_of,
    predicted_states,
    recompute_of,
    routed_spec,
)
from megalite.plan.step_time import played_micro_batches

REUSE_DISTANCE = 10**9  # DeepSpeed's defaults (runtime/zero/config.py)
PREFETCHED = 5 * 10**7


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank's device at the peak of a step. gradients, buckets, activations: at that moment
    (memory_timeline.py); buckets include what is sent, activations the intermediate results of a backward. messages: in
    flight on the pipe axis. gathered: ZeRO-3's weights while they are used. libraries: an assumption."""

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
        """The sum of all parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by purpose."""
        return {name: value for name, value in vars(self).items() if name != "rank"}


class SizesByPlace:
    """Parameter sizes of a rank's stage, cached by the kind of its chunks: a stage on the meta device takes
    milliseconds per layer, and most ranks of a pipe axis hold the same."""

    def __init__(self) -> None:
        self._known: dict[object, Sizes] = {}

    def of(self, config: Config, spec: TransformerSpec, plan: PipelinePlan, rank: int) -> Sizes:
        """Sizes of a rank of the pipe axis, at the index of the tensor axis that has the most."""
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
    """The memory of each rank of the pipe axis for a resolved config, at the index of the other axes that has the
    most."""

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
        """Number of weights of each rank of the pipe axis."""
        ranks = range(self.plan.pipe)
        held = [self.sizes.of(self.config, self.spec, self.plan, rank) for rank in ranks]
        return [_held(sizes, self.config.parallel.expert) for sizes in held]

    @cached_property
    def ranks(self) -> list[RankMemory]:
        """The ranks of the pipe axis, in order."""
        return [self._rank(rank) for rank in range(self.plan.pipe)]

    @property
    def largest(self) -> RankMemory:
        """The rank with the most memory."""
        return max(self.ranks, key=lambda held: held.total)

    def _rank(self, pipe_rank: int) -> RankMemory:
        config, spec, plan = self.config, self.spec, self.plan
        sizes = self.sizes.of(config, spec, plan, pipe_rank)
        copies, tensor = config.data_size * config.parallel.context, config.parallel.tensor
        # With fp32 and ZeRO the replicas hold different gradients: those of the parameters that overlap their part.
        by_place = config.precision == "fp32" and config.zero_stage in (1, 2)
        places = range(copies) if by_place else [0]
        grids = [
            place_of(config, (pipe_rank * copies + place) * tensor + tensor - 1) for place in places
        ]
        grid = max(grids, key=lambda grid: owned_gradients(config, sizes, grid))
        states = predicted_states(config, sizes, grid)
        gathered, in_flight = 0, 0
        if config.zero_stage == 3 and copies > 1:
            numbers = [size for group in sizes for size in group.numbers]
            gathered = self.at.width * _whole_at_once(config, numbers, spec)
            in_flight = self.at.width * _in_flight(config, numbers)
        moment = self._most(pipe_rank, self._reduction(sizes, grid), in_flight)
        neighbours = (pipe_rank > 0) + (pipe_rank < plan.pipe - 1)
        return RankMemory(
            grid.rank,
            states.weights,
            self._standing_gradients(sizes, states, grid) + moment.gradients,
            0 if self._on_host else states.optimizer,
            moment.buckets,
            moment.kept,
            # Receives posted early and incomplete sends, for each neighbour.
            neighbours * (AHEAD + 1) * self.at.hidden(spec),
            gathered,
            self._libraries(),
        )

    def _standing_gradients(self, sizes: Sizes, states: States, grid: Grid) -> int:
        """Bytes of gradients that always exist."""
        config = self.config
        if config.zero_stage == 3:
            return states.gradients
        if config.zero_stage == 0 or not offloads(config):
            return 0
        moved = 0 if self._on_host else (FP32 + self.at.width) * sum(partition_sizes(sizes, grid))
        return moved + offload_buffers(config, sizes)

    @property
    def _on_host(self) -> bool:
        """Whether the optimizer steps in main memory and the device has its own."""
        return self.device is not None and not self.device.cores and offloads(self.config)

    def _reduction(self, sizes: Sizes, grid: Grid) -> Reduction:
        """The rules for the gradients of a rank at this place."""
        config, numbers = self.config, all_numbers(sizes)
        bucket = bucket_numbers(config) if config.zero_stage else 0
        on_cpu = self.device is not None and self.device.cores > 0
        return Reduction(
            config.zero_stage,
            self.at.width,
            numbers,
            tuple(partition_sizes(sizes, grid)),
            owned_gradients(config, sizes, grid) if config.zero_stage in (1, 2) else 0,
            # On a CPU, pages that are never written take no memory.
            min(bucket, numbers) if on_cpu else bucket,
            1 + bool(config.zero.overlap_comm),
            grid.replica.size,
            self.at.device == "cpu",
        )

    def _most(self, pipe_rank: int, rules: Reduction, in_flight: int) -> Moment:
        """The peak of a rank of the pipe axis."""
        config, plan = self.config, self.plan
        spec = routed_spec(config, self.spec)
        parts, recompute = parts_of(plan, pipe_rank), recompute_of(config)
        has_head = any(part.last for part in parts.values())
        chunks = {
            number: ChunkMemory(spec, part, recompute, self.at, in_flight, has_head)
            for number, part in parts.items()
        }
        played = played_micro_batches(plan, config.accumulation_steps)
        return most_memory(plan.program(played), pipe_rank, chunks, rules)

    def _libraries(self) -> int:
        if self.device is None or self.device.cores:
            return 0
        return int(OVERHEAD_BYTES + FRAGMENTS * self.device.memory_bytes)


def check_states(config: Config, spec: TransformerSpec, memory_bytes: int) -> None:
    """Raises ConfigError if weights, gradients and optimizer state of a rank alone exceed its device's memory."""
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
            rule = f"a GPU here has {memory_bytes / GIB:.1f} GiB (megalite plan finds a layout that fits)"
            raise ConfigError(
                f"world size: {config.world_size}: rank {place.rank} needs {needed / GIB:.1f} GiB for {what}: {rule}"
            )


def _held(sizes: Sizes, expert: int) -> Held:
    """Number of weights of a rank, with those that an expert axis divides separate."""
    routed = [group for group in sizes if expert > 1 and group.replicas == "expert_replica"]
    count = all_numbers(routed)
    return Held(float(all_numbers(sizes) - count), float(count))


def _whole_at_once(config: Config, numbers: list[int], spec: TransformerSpec) -> int:
    """Elements of ZeRO-3's weights that are gathered at a time, besides those that always are.

    At least a layer, or the embedding if it is larger, and another one that is prefetched. But DeepSpeed does not
    release a weight that is used again soon (runtime/zero/partitioned_param_coordinator.py, __params_to_release): if n
    elements follow a weight in forward, it is used again 2n elements later, in backward.
    """
    layer = max(max(numbers), sum(numbers) // max(1, spec.num_layers))
    distance = config.zero.stage3_max_reuse_distance
    soon = (REUSE_DISTANCE if distance is None else distance) // 2
    dropped = sum(count for count in numbers if count > persistence_threshold(config))
    return max(2 * layer, min(dropped, soon))


def _in_flight(config: Config, numbers: list[int]) -> int:
    """Elements of ZeRO-3's weights that are prefetched; they exist twice until the last of them is used."""
    ahead = config.zero.stage3_prefetch_bucket_size
    dropped = sum(count for count in numbers if count > persistence_threshold(config))
    return min(PREFETCHED if ahead is None else ahead, dropped)
