"""DeepSpeed's engine and optimizers, extended where the model plane (pipe × tensor) needs it: the one place for it.

ZeRO-1, 2 and 3: the norm is ours (norm.py); both copies of a tied embedding get the sum of their gradients.
ZeRO-0: the same for DeepSpeed's plain fp32 path. Whether a step's update happens is the norm's word, on every rank
or on none. `Engine.shards` tells what a rank holds of masters and moments, the same way for every stage. Next:
pipeline.py, which drives the engine.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megalite.parallel.clock import Clock
from megalite.parallel.collectives import sum_over
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Placement, Shard, placed
from megalite.parallel.norm import GlobalNorm

INVALID_NORM = -1.0  # DeepSpeed's sign for a norm that is not finite (runtime/utils.py)
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # of all optimizers, by torch's and DeepSpeed's names
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of what an optimizer keeps of each weight."""
    if isinstance(optimizer, torch.optim.SGD):
        return MOMENTS[:1] if optimizer.defaults["momentum"] else ()
    return MOMENTS[1:]


class _OneVerdict:
    """Of both optimizers: the global norm, which is the same on every rank, says alone whether a step is skipped."""

    global_norm: GlobalNorm
    loss_scaler: Any
    overflow: bool

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Called by DeepSpeed's step before the norm: two more messages that would say no more than it does."""

    def _update_scale(self, has_overflow: bool = False) -> None:
        """Called by DeepSpeed's step before it divides the gradients by the loss scale: where the scale grew just then
        they would come out too small (tests/distributed/test_fp16.py). So it moves after the step."""

    def step(self, closure: Any = None) -> None:
        """DeepSpeed's, then the loss scale's. A step that was refused for another reason than overflow leaves it."""
        super().step(closure)  # type: ignore[misc]
        overflowed = self.global_norm.overflowed
        if self.loss_scaler.dynamic and self.overflow == overflowed:
            self.loss_scaler.raise_error_at_min_scale = False  # the judge has decided what happens there
            self.loss_scaler.update_scale(overflowed)


class ShardedOptimizer(_OneVerdict, DeepSpeedZeroOptimizer):
    """ZeRO-1 and ZeRO-2. An optimizer that DeepSpeed has made becomes one by `adopt`: its constructor takes 40
    arguments that only the engine knows, and nothing of what it made is changed."""

    grid: Grid
    tied_group: int | None

    @classmethod
    def adopt(cls, optimizer: DeepSpeedZeroOptimizer, norm: GlobalNorm, grid: Grid, tied: nn.Parameter | None) -> None:
        """Turns DeepSpeed's optimizer into ours, in place."""
        optimizer.__class__ = cls
        assert isinstance(optimizer, ShardedOptimizer)
        optimizer.global_norm, optimizer.grid = norm, grid
        groups = optimizer.bit16_groups
        optimizer.tied_group = next((i for i, group in enumerate(groups) if any(p is tied for p in group)), None)

    def fragments(self) -> Iterator[tuple[Any, Any, int, int, int]]:
        """This rank's part of each parameter: (parameter, flat fp32 partition, first element there, number of
        elements, first element in the parameter)."""
        for group, partition in zip(self.bit16_groups, self.single_partition_of_fp32_groups, strict=True):
            for value in group:
                if value._hp_mapping is not None:
                    here, there = value._hp_mapping.hp_fragment_address, value._hp_mapping.lp_fragment_address
                    yield value, partition, here.start, here.numel, there.start

    def gradient_pieces(self) -> Iterator[tuple[Placement, Tensor]]:
        """This rank's part of the averaged gradients; padding left out."""
        if self.cpu_offload:
            for value, partition, start, count, _ in self.fragments():
                yield value.placement, partition.grad.narrow(0, start, count)
            return
        for group in range(len(self.bit16_groups)):
            pieces = (g for g in self.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            for value, gradient in zip(self.params_in_partition[group], pieces, strict=False):
                yield value.placement, gradient

    def sum_tied_gradients(self) -> None:
        """Adds up the gradients of a tied embedding's two copies. It has a parameter group of its own, so that
        its shards over the data axis are the same on both stages."""
        if self.tied_group is None:
            return
        if self.cpu_offload:
            sum_over(self.single_partition_of_fp32_groups[self.tied_group].grad, self.grid.ends)
            return
        for gradient in self.averaged_gradients[self.tied_group]:
            sum_over(gradient, self.grid.ends)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Called by DeepSpeed's step; the scale is that of the loss."""
        self.sum_tied_gradients()
        norm = self.global_norm(self.gradient_pieces(), torch.device(self.device), copies=1)
        return torch.where(norm.isfinite(), norm, INVALID_NORM).float()

    def shards(self) -> Iterator[Shard]:
        for value, partition, start, count, first in self.fragments():
            state = self.optimizer.state.get(partition, {})
            moments = {name: state[name].narrow(0, start, count) for name in MOMENTS if name in state}
            yield Shard(value.placement, first, partition.detach().narrow(0, start, count), moments)

    def masters_changed(self) -> None:
        """Copies the masters to the weights that the model computes with (collective over the data axis)."""
        self.update_lp_params()


class _TimedCoordinator(PartitionedParameterCoordinator):
    """ZeRO-3's gathering of weights, on the clock as waiting for others."""

    clock: Clock

    def fetch_sub_module(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.waiting():
            super().fetch_sub_module(*args, **kwargs)


class FullyShardedOptimizer(_OneVerdict, DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3, adopted in the same way. Its gradient shards may end with padding, which is zero.

    With offload_optimizer.device nvme masters and moments of a sub-group lie in files between steps, one flat run of
    fp32 numbers each, and what is held in memory of them means nothing. `shards` maps the files into memory.
    """

    optimizer_swapper: Any

    @classmethod
    def adopt(cls, optimizer: DeepSpeedZeroOptimizer_Stage3, norm: GlobalNorm, clock: Clock) -> None:
        """Turns DeepSpeed's optimizer into ours, in place."""
        optimizer.__class__ = cls
        assert isinstance(optimizer, FullyShardedOptimizer)
        optimizer.global_norm = norm
        coordinator: Any = optimizer.parameter_offload.get_param_coordinator()
        coordinator.__class__, coordinator.clock = _TimedCoordinator, clock
        for partition in optimizer.fp32_partitioned_groups_flat:
            partition.grad = None  # DeepSpeed's second copy of the gradients, which `_prepare_sub_group` does without

    def flat_gradient(self, group: int) -> Tensor:
        """A sub-group's part of the buffer that gradients are summed in."""
        sizes = self.fp16_partitioned_groups_flat_numel
        return self.grad_partitions_flat_buffer.narrow(0, sum(sizes[:group]), sizes[group])

    def gradient_pieces(self) -> Iterator[tuple[Placement, Tensor]]:
        """This rank's part of the averaged gradients."""
        for group, values in enumerate(self.fp16_groups):
            flat = self.flat_gradient(group)
            for value in values:
                _, start, count = self.grad_position[self.get_param_id(value)]
                yield value.placement, flat.narrow(0, start, count)

    def _offload_grad_partition_at_boundary(self, *args: Any) -> None:
        """Called by DeepSpeed's reduction, with offloading, to copy a gradient from the buffer, which is in main memory
        already, to main memory or to a file."""

    def _prepare_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        """Called by DeepSpeed's step: reads a sub-group's files where it has any."""
        super()._prepare_sub_group(sub_group_id, timer_names)
        if self.offload_optimizer:
            partition = self.fp32_partitioned_groups_flat[sub_group_id]
            partition.grad = self.flat_gradient(sub_group_id).to(partition.device)

    def _get_norm_groups(self) -> list[Tensor]:
        """Called by DeepSpeed's step, which takes the root of the sum of squares: of one, ours."""
        norm = self.global_norm(self.gradient_pieces(), torch.device(self.device), copies=1)
        return [torch.where(norm.isfinite(), norm, INVALID_NORM).float()]

    def shards(self) -> Iterator[Shard]:
        for group, values in enumerate(self.fp16_groups):
            master, state = self.flat_tensors(group)
            for value in values:
                _, start, count = self.grad_position[self.get_param_id(value)]
                first = count * self._get_param_partition_rank(value)
                count = max(0, min(count, value.ds_numel - first))
                moments = {name: moment.narrow(0, start, count) for name, moment in state.items()}
                yield Shard(value.placement, first, master.narrow(0, start, count), moments)

    def flat_tensors(self, group: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Master and moments of a sub-group: in memory, or in files that are mapped, so that writing writes there."""
        partition = self.fp32_partitioned_groups_flat[group]
        state = self.optimizer.state.get(partition, {})
        held = {name: state[name] for name in MOMENTS if name in state}
        if not self._swappable_optimizer_subgroup(group):
            return partition.detach(), held
        size = self.fp16_partitioned_groups_flat_numel[group]
        master, *moments = (_mapped(file.swap_path, size) for file in self.files(partition).tensors)
        return master, dict(zip(held, moments, strict=True))

    def files(self, partition: Any) -> Any:
        """DeepSpeed's record of the files of a sub-group."""
        return self.optimizer_swapper.swap_params_info[partition.ds_id]

    def zero_moments(self, group: int) -> dict[str, Tensor]:
        """New moments of a sub-group. Files are made before the first step, which would hold all moments in memory; and
        with their room on the disk, since DeepSpeed does not notice where there is none."""
        partition, names = self.fp32_partitioned_groups_flat[group], moments_of(self.optimizer)
        if not self._swappable_optimizer_subgroup(group):
            return {name: torch.zeros_like(partition, requires_grad=False) for name in names}
        moments = {name: torch.empty(0) for name in names}
        for name, moment in moments.items():
            moment.ds_id = f"{name}-{partition.ds_id}"  # type: ignore[attr-defined]  # DeepSpeed names the file by it
        files = self.files(partition)
        del files.tensors[1:]
        files.add_state_tensors(moments.values())
        for file in files.tensors[1:]:
            with open(file.swap_path, "wb") as made:
                os.posix_fallocate(made.fileno(), 0, os.path.getsize(files.tensors[0].swap_path))
        return moments

    @property
    def swap_buffers(self) -> list[Tensor]:
        """What sub-groups in files are read into."""
        return self.optimizer_swapper.swap_buffer_manager.all_buffers if self.swap_optimizer else []

    def masters_changed(self) -> None:
        """Copies the masters to the shards that the model's weights are gathered from, as DeepSpeed's step does."""
        self._partition_all_parameters()
        for group, weights in enumerate(self.fp16_partitioned_groups_flat):
            weights.data.copy_(self.flat_tensors(group)[0])
            self._unflatten_partitioned_parameters(group)
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)


class Engine(DeepSpeedEngine):
    """DeepSpeed's engine around one stage (a model/transformer.py Stage, already with its place in the grid)."""

    _highest_gradients: int | None = None

    def __init__(self, stage: Any, grid: Grid, **kwargs: Any) -> None:
        self.grid = grid
        super().__init__(model=stage, mpu=grid, **kwargs)
        self.global_norm = GlobalNorm(placement for _, placement in placed(stage))
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            ShardedOptimizer.adopt(self.optimizer, self.global_norm, grid, stage.tied_parameter)
        elif isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            FullyShardedOptimizer.adopt(self.optimizer, self.global_norm, grid.clock)
            if self.optimizer.swap_optimizer:
                self.make_moments(0)

    @property
    def stage(self) -> Any:
        """The stage that this engine runs."""
        return self.module

    def begin_step(self, micro_batches: int) -> None:
        """Says how many micro-batches the next step has, which may change from step to step: DeepSpeed scales by their
        number, and finds the last one by a count that goes on over all steps."""
        self.set_train_batch_size(self.train_micro_batch_size_per_gpu() * micro_batches * self.grid.data.size)
        self.micro_steps = 0

    def _take_model_step(self, lr_kwargs: Any) -> None:
        """DeepSpeed's scheduler goes on after a skipped step too: the learning rate is a function of the step."""
        super()._take_model_step(lr_kwargs)
        if getattr(self.optimizer, "overflow", False) and self.lr_scheduler is not None:
            self.lr_scheduler.step()

    @property
    def dynamic_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None where the scale is fixed or there is none."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return scaler if isinstance(scaler, DynamicLossScaler) else None

    @property
    def current_loss_scale(self) -> float:
        """What the loss is multiplied with in backward."""
        return float(getattr(self.optimizer, "loss_scale", 1.0))

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """ZeRO-1 with bf16 goes the way of ZeRO-1 and 2 in all other types, not to BF16_Optimizer, which
        all-reduces where a reduce-scatter does and holds zeroed gradients beside the real ones."""
        chosen = super()._do_optimizer_sanity_check(basic_optimizer)
        return "zero_optimization" if self.zero_optimization() else chosen

    def clip_fp32_gradients(self) -> None:
        """ZeRO-0: tied sums, our norm, clipping by it as torch's clip_grad_norm_ does. Where the update is refused the
        gradients go, and optimizers leave alone what has none."""
        stage = self.stage
        if stage.tied_parameter is not None and stage.tied_parameter.grad is not None:
            sum_over(stage.tied_parameter.grad, self.grid.ends)
        gradients = [(place, value.grad) for value, place in placed(stage) if value.grad is not None]
        norm = self.global_norm(gradients, torch.device(self.device or "cpu"), copies=self.grid.data.size)
        self._global_grad_norm = norm.float()
        if not norm.isfinite():
            for value, _ in placed(stage):
                value.grad = None
        elif self.gradient_clipping() > 0:
            factor = (self.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
            for _, gradient in gradients:
                gradient.mul_(factor.to(gradient.dtype))

    def shards(self) -> list[Shard]:
        """What this rank holds of masters and moments. With ZeRO-0 every rank of the data axis holds all of it."""
        if self.zero_optimization():
            return list(self.optimizer.shards())  # type: ignore[union-attr]
        held = self._adam.state
        return [
            Shard(place, 0, value.detach().view(-1), {
                name: held[value][name].view(-1) for name in MOMENTS if name in held.get(value, {})})
            for value, place in placed(self.stage)
        ]

    def make_moments(self, steps: int) -> None:
        """Gives the optimizer its state as after `steps` steps, all zero, so that `shards` can be filled from a
        checkpoint before the first step (the optimizers make it lazily)."""
        optimizer = self._adam
        counter: Any = torch.tensor(float(steps)) if type(optimizer).__module__.startswith("torch.") else steps
        for number, value in enumerate(self._masters()):
            if isinstance(self.optimizer, FullyShardedOptimizer):
                moments = self.optimizer.zero_moments(number)
            else:
                moments = {name: torch.zeros_like(value, requires_grad=False) for name in moments_of(optimizer)}
            optimizer.state[value] = {"step": counter.clone() if isinstance(counter, Tensor) else counter, **moments}

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps."""
        assert self.basic_optimizer is not None
        return self.basic_optimizer

    def _masters(self) -> list[Tensor]:
        """The tensors that the optimizer steps."""
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            return self.optimizer.fp32_partitioned_groups_flat
        return [value for group in self._adam.param_groups for value in group["params"]]

    def masters_changed(self) -> None:
        """To be called after `shards` were written to: the model's weights follow (collective)."""
        if self.zero_optimization():
            self.optimizer.masters_changed()  # type: ignore[union-attr]

    def gradient_clipping(self) -> float:
        """ZeRO-0: DeepSpeed calls `clip_fp32_gradients` only where this is above 0, and the norm, the tied sum and
        the check for NaN are wanted always."""
        asked = super().gradient_clipping()
        return asked if asked > 0 or self.zero_optimization() else float("inf")

    @contextmanager
    def weighed(self) -> Iterator[dict[str, int]]:
        """Around one optimizer step: on leaving, the dict has `state_bytes` after it, with the most gradients that
        stood after the backward of one of its micro-batches."""
        self._highest_gradients = 0
        result: dict[str, int] = {}
        try:
            yield result
        finally:
            highest, self._highest_gradients = self._highest_gradients, None
        result.update(self.state_bytes() | {"gradients_bytes": highest})

    def step(self, lr_kwargs: Any = None) -> None:
        """Called after each micro-batch's backward; the update follows the last one's."""
        if self._highest_gradients is not None:
            self._highest_gradients = max(self._highest_gradients, self.state_bytes()["gradients_bytes"])
        super().step(lr_kwargs)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of this rank's weights, optimizer state (masters and moments) and gradients as they lie in memory
        now, each storage once. Gradients stand between the first backward and the update."""
        seen: set[int] = set()
        values = [value for value, _ in placed(self.stage)]
        weights = [t for value in values for t in (value.data, getattr(value, "ds_tensor", None))]
        moments = [state[name] for state in self._adam.state.values() for name in MOMENTS if name in state]
        masters = self._masters()
        buffers = self.optimizer.swap_buffers if isinstance(self.optimizer, FullyShardedOptimizer) else []
        gradients = [*(value.grad for value in values), *map(_own_sum, values), *(master.grad for master in masters)]
        held = [*_tensors_of(vars(self.optimizer))] if self.zero_optimization() else []
        return {
            "weights_bytes": _new_bytes(weights, seen),
            "optimizer_bytes": _new_bytes([*masters, *moments, *buffers], seen),
            # What else the ZeRO optimizer holds on to is gradients, whole or in parts.
            "gradients_bytes": _new_bytes([*gradients, *held], seen),
        }


def _mapped(path: str, count: int) -> Tensor:
    """fp32 numbers of a file as a tensor [count] over its pages, which the system reads, writes back and drops.
    DeepSpeed goes past them (O_DIRECT); on a disk of this machine both agree (training/nvme.py tries it)."""
    assert os.path.getsize(path) >= 4 * count, f"{path}: shorter than what was written, and would be lengthened here"
    return torch.from_file(path, shared=True, size=count, dtype=torch.float32)


def _own_sum(value: Any) -> Tensor | None:
    """The fp32 sum of a 16-bit gradient with ZeRO-1. After the reduction it is a view of DeepSpeed's bucket, no more
    than scratch, which is kept until the next forward."""
    held = getattr(value, "grad_accum", None)
    return held if held is not None and held.untyped_storage().nbytes() == held.nbytes else None


def _tensors_of(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_of(part, depth - 1)


def _new_bytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    """Bytes of the storages that are not in `seen` yet, which they then are. Scalars and flags are left out, and meta
    tensors, which have a size and no memory."""
    total = 0
    for tensor in tensors:
        if tensor is not None and tensor.dim() > 0 and tensor.is_floating_point() and not tensor.is_meta:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total
