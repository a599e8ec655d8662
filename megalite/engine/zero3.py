"""DeepSpeed's ZeRO-3, extended in the same way: weights are sharded too, and the optimizer's states may be in files.
Next: engine.py.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from megalite.engine.device_streams import (
    copy_without_waiting,
    join_on_the_device,
    make_follow,
    release_page_locked,
    wait_on_the_host,
    without_device_waits,
)
from megalite.engine.norm import GlobalNorm
from megalite.engine.zero import INVALID_NORM, MOMENTS, OneVerdict, moments_of
from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.layers import Placement, Shard


class _TimedCoordinator(PartitionedParameterCoordinator):
    """ZeRO-3's gathering of weights, which counts as waiting time."""

    def fetch_sub_module(self, *args: Any, **kwargs: Any) -> None:
        with RANK_CLOCK.waiting():
            super().fetch_sub_module(*args, **kwargs)

    def follow_update(self) -> None:
        """Call after an update is queued: the next gathers, which have a stream of their own, wait for it. DeepSpeed
        relies on the host, which waits for the device after each update if some weights stay whole."""
        make_follow(self._PartitionedParameterCoordinator__allgather_stream)  # type: ignore[attr-defined]


class FullyShardedOptimizer(OneVerdict, DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3, adopted in the same way. Its gradient shards may end with padding, which is zero.

    With offload_optimizer.device nvme, masters and moments of a sub-group are in files between steps, each a flat
    sequence of fp32 numbers, and their tensors in memory are meaningless. `shards` maps the files into memory.
    """

    optimizer_swapper: Any

    @classmethod
    def adopt(cls, optimizer: DeepSpeedZeroOptimizer_Stage3, norm: GlobalNorm) -> None:
        """Turns DeepSpeed's optimizer into ours, in place."""
        optimizer.__class__ = cls
        assert isinstance(optimizer, FullyShardedOptimizer)
        optimizer.global_norm = norm
        coordinator: Any = optimizer.parameter_offload.get_param_coordinator()
        coordinator.__class__ = _TimedCoordinator
        # DeepSpeed makes the host wait after each backward (independent_gradient_partition_epilogue).
        join_on_the_device(optimizer.reduce_and_partition_stream)
        if optimizer.offload_param:
            # DeepSpeed makes the host wait at each gather. The shards change in updates, after the norm, for which the
            # host has waited, and in `masters_changed`.
            for shard in (value.ds_tensor for values in optimizer.fp16_groups for value in values):
                copy_without_waiting(shard)
        for partition in optimizer.fp32_partitioned_groups_flat:
            partition.grad = None  # DeepSpeed's second copy of the gradients, which `_prepare_sub_group` does not need
        release_page_locked()

    def flat_gradient(self, group: int) -> Tensor:
        """A sub-group's part of the buffer in which gradients are summed."""
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
        """Called by DeepSpeed's reduction, with offload, to copy a gradient from the buffer to main memory or to a
        file. Does nothing: the buffer is already in main memory."""

    def _prepare_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        """Called by DeepSpeed's step: reads a sub-group's files, if it has any."""
        super()._prepare_sub_group(sub_group_id, timer_names)
        if self.offload_optimizer:
            partition = self.fp32_partitioned_groups_flat[sub_group_id]
            partition.grad = self.flat_gradient(sub_group_id).to(partition.device)

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """As DeepSpeed's, but does not touch gradients that do not change."""
        gradient: Any = self.fp32_partitioned_groups_flat[sub_group_id].grad
        self.divide([gradient], total_norm)

    def _post_step(self, timer_names: set[str]) -> None:
        """Called by DeepSpeed's step after the update: gathers the weights that stay whole, without making the host
        wait until the device has them."""
        self._follow_update()
        with without_device_waits():
            super()._post_step(timer_names)

    def _follow_update(self) -> None:
        coordinator: Any = self.parameter_offload.get_param_coordinator()
        coordinator.follow_update()

    def _get_norm_groups(self) -> list[Tensor]:
        """Called by DeepSpeed's step, which computes the root of the sum of the squares: here of a single value, our
        norm. It is the first in a step that reads the gradients."""
        if self.offload_optimizer:
            wait_on_the_host()
        norm = self.global_norm(self.gradient_pieces(), torch.device(self.device), replicated=False)
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
        """Master and moments of a sub-group: in memory, or as writable memory maps of its files."""
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
        """New moments of a sub-group. Files are created before the first step, which would hold all moments in memory,
        and their disk space is allocated, since DeepSpeed does not notice a full disk."""
        partition, names = self.fp32_partitioned_groups_flat[group], moments_of(self.optimizer)
        if not self._swappable_optimizer_subgroup(group):
            return {name: torch.zeros_like(partition, requires_grad=False) for name in names}
        moments = {name: torch.empty(0) for name in names}
        for name, moment in moments.items():
            moment.ds_id = f"{name}-{partition.ds_id}"  # type: ignore[attr-defined]  # names the file
        files = self.files(partition)
        del files.tensors[1:]
        files.add_state_tensors(moments.values())
        for file in files.tensors[1:]:
            with open(file.swap_path, "wb") as made:
                os.posix_fallocate(made.fileno(), 0, os.path.getsize(files.tensors[0].swap_path))
        return moments

    @property
    def swap_buffers(self) -> list[Tensor]:
        """The buffers that files are read into; empty without files."""
        return self.optimizer_swapper.swap_buffer_manager.all_buffers if self.swap_optimizer else []

    def masters_changed(self) -> None:
        """Copies the masters to the shards from which the model's weights are gathered, as DeepSpeed's step does."""
        if self.offload_param:  # a gather that was made ahead may still copy a shard
            get_accelerator().synchronize()  # type: ignore[union-attr]
        self._partition_all_parameters()
        for group, weights in enumerate(self.fp16_partitioned_groups_flat):
            weights.data.copy_(self.flat_tensors(group)[0])
            self._unflatten_partitioned_parameters(group)
        self._follow_update()
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)


def _mapped(path: str, count: int) -> Tensor:
    """The fp32 numbers of a file as a memory-mapped tensor [count]. DeepSpeed bypasses the page cache (O_DIRECT); both
    agree on a local disk (engine/nvme.py tests it)."""
    assert os.path.getsize(path) >= 4 * count, (
        f"{path}: shorter than what was written; mapping would extend it"
    )
    return torch.from_file(path, shared=True, size=count, dtype=torch.float32)
