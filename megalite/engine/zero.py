"""DeepSpeed's ZeRO-1 and 2, extended for the model plane (pipe × tensor); and what all ZeRO stages have in common.

The norm is ours (norm.py). Copies of a parameter on several stages, such as a tied embedding, get the sum of their
gradients. The norm decides whether a step's update happens, on every rank or on none. Next: zero3.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megalite.engine.device_streams import wait_for, without_device_waits
from megalite.engine.norm import GlobalNorm
from megalite.parallel.collectives import sum_over
from megalite.parallel.grid import Axis
from megalite.parallel.layers import Placement, Shard

INVALID_NORM = -1.0  # DeepSpeed's value for a norm that is not finite (runtime/utils.py)
# The moments of all optimizers, by torch's and DeepSpeed's names.
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the moments that an optimizer keeps for each weight."""
    if isinstance(optimizer, torch.optim.SGD):
        return MOMENTS[:1] if optimizer.defaults["momentum"] else ()
    return MOMENTS[1:]


class OneVerdict:
    """Base of both optimizers: only the global norm, which is the same on every rank, decides whether a step is
    skipped."""

    global_norm: GlobalNorm
    loss_scaler: Any
    loss_scale: float
    clip_grad: float
    overflow: bool
    _divisor: tuple[Tensor | None, float] = (None, 1.0)
    """A step's norm, and what its gradients are divided by."""

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Called by DeepSpeed's step before the norm. Does nothing: it would send two messages that tell no more than
        the norm does."""

    def _update_scale(self, has_overflow: bool = False) -> None:
        """Called by DeepSpeed's step before it divides the gradients by the loss scale. Does nothing: if the scale grew
        at that moment, the gradients would become too small (tests/distributed/test_fp16.py). It changes after the
        step."""

    def step(self, closure: Any = None) -> None:
        """DeepSpeed's step, then the update of the loss scale, which stays if the step was refused for another reason
        than overflow."""
        super().step(closure)  # type: ignore[misc]
        overflowed = self.global_norm.overflowed
        if self.loss_scaler.dynamic and self.overflow == overflowed:
            # The judge has decided what happens at the smallest scale.
            self.loss_scaler.raise_error_at_min_scale = False
            self.loss_scaler.update_scale(overflowed)

    def divide(self, gradients: Sequence[Tensor], total_norm: Tensor) -> None:
        """Divides fp32 gradients by the loss scale and clips them; does not touch them if nothing changes.

        total_norm: a scalar in main memory, which includes the loss scale; the same object for all gradients of a step.
        """
        if self._divisor[0] is not total_norm:
            divisor: Any = self.loss_scale
            if self.clip_grad > 0.0:
                divisor = ((total_norm / self.loss_scale + 1e-6) / self.clip_grad).clamp(
                    min=1.0
                ) * self.loss_scale
            self._divisor = total_norm, float(divisor)
        if self._divisor[1] != 1.0:
            for gradient in gradients:
                gradient.mul_(1.0 / self._divisor[1])


class ShardedOptimizer(OneVerdict, DeepSpeedZeroOptimizer):
    """ZeRO-1 and ZeRO-2. `adopt` turns an optimizer that DeepSpeed has made into one by changing its class: the
    constructor takes 40 arguments that only the engine knows. Its state is not changed."""

    tied_groups: list[tuple[int, Axis]]

    @classmethod
    def adopt(
        cls,
        optimizer: DeepSpeedZeroOptimizer,
        norm: GlobalNorm,
        ties: Sequence[tuple[nn.Parameter, Axis]],
    ) -> None:
        """Turns DeepSpeed's optimizer into ours, in place. ties: as in Stage."""
        optimizer.__class__ = cls
        assert isinstance(optimizer, ShardedOptimizer)
        optimizer.global_norm = norm
        groups = enumerate(optimizer.bit16_groups)
        number_of = {id(value): number for number, group in groups for value in group}
        # In the order of `ties`, which is the same on all stages; the order of groups is not.
        tied = {number_of[id(value)]: axis for value, axis in ties}
        optimizer.tied_groups = list(tied.items())

    def fragments(self) -> Iterator[tuple[Any, Any, int, int, int]]:
        """This rank's part of each parameter: (parameter, flat fp32 partition, first element there, number of
        elements, first element in the parameter)."""
        for group, partition in zip(
            self.bit16_groups, self.single_partition_of_fp32_groups, strict=True
        ):
            for value in group:
                if value._hp_mapping is not None:
                    here, there = (
                        value._hp_mapping.hp_fragment_address,
                        value._hp_mapping.lp_fragment_address,
                    )
                    yield value, partition, here.start, here.numel, there.start

    def gradient_pieces(self) -> Iterator[tuple[Placement, Tensor]]:
        """This rank's part of the averaged gradients, without padding."""
        if self.cpu_offload:
            for value, partition, start, count, _ in self.fragments():
                yield value.placement, partition.grad.narrow(0, start, count)
            return
        for group in range(len(self.bit16_groups)):
            pieces = (
                g for g in self.averaged_gradients[group] if not getattr(g, "_zero_padding", False)
            )
            for value, gradient in zip(self.params_in_partition[group], pieces, strict=False):
                yield value.placement, gradient

    def sum_tied_gradients(self) -> None:
        """Sums the gradients of tied copies. They have separate parameter groups, so that their shards over the data
        axis are the same on all stages."""
        for number, axis in self.tied_groups:
            if self.cpu_offload:
                held = self.single_partition_of_fp32_groups[number].grad
                device = self.bit16_groups[number][0].device  # which collectives need
                held.copy_(sum_over(held.to(device), axis))
                continue
            for gradient in self.averaged_gradients[number]:
                sum_over(gradient, axis)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Called by DeepSpeed's step. The norm includes the loss scale."""
        self.sum_tied_gradients()
        norm = self.global_norm(self.gradient_pieces(), torch.device(self.device), replicated=False)
        return torch.where(norm.isfinite(), norm, INVALID_NORM).float()

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        """As DeepSpeed's, without its check for each group whether the norm is valid, which `step` has already made."""
        self.divide(grad_groups_flat, total_norm)

    def _fill_param_grad_accum_attribute(self, param: Any) -> None:
        """Called by DeepSpeed's hooks: adds a 16-bit gradient to its fp32 sum, in one kernel that reads both. DeepSpeed
        first writes an fp32 copy of the gradient and then reads it: 18 bytes per element instead of 10."""
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        if param.grad_accum is None:
            param.grad_accum = gradient.to(self.gradient_accumulation_dtype)
        else:
            param.grad_accum.add_(gradient.view_as(param.grad_accum))

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        """Called by DeepSpeed's hooks: puts a gradient into a bucket. Tensors that the tensor axis cuts unevenly (an
        odd vocabulary) get separate buckets: a sum over three or more ranks adds in an order that depends on an
        element's position in the message, so after slices of different sizes the tensor ranks' copies of a whole weight
        would get different sums."""
        dtype = self.get_param_comm_dtype(param)
        bucket = self.ipg_buckets[dtype]
        if bucket.params:
            group, number, _ = bucket.params[-1]
            last: Any = self.bit16_groups[group][number]
            if last.placement.uneven != param.placement.uneven:
                self.reduce_ipg_grads(comm_dtype=dtype)
                if self.contiguous_gradients and self.overlap_comm:
                    bucket.index = 1 - bucket.index
        super().reduce_independent_p_g_buckets_and_remove_grads(param, i)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Called by DeepSpeed after a step's last backward, with ZeRO-1. With overlap_comm its hooks have reduced,
        during it, what it gave a gradient, and only that: a chunk, or a head, whose last backward came earlier
        would be left out."""
        if self.overlap_comm:
            waiting = {name for bucket in self.ipg_buckets.values() for *_, name in bucket.params}
            for group, values in enumerate(self.bit16_groups):
                for value in values:
                    name = self.get_param_id(value)
                    reduced = self.params_already_reduced[name] or name in waiting
                    if not reduced and self.get_gradient_for_reduction(value) is not None:
                        self.reduce_ready_partitions_and_remove_grads(value, group)
        super().reduce_gradients(pipeline_parallel)

    def update_offload_overflow_tracker(self, grad: Any) -> None:
        """Called by DeepSpeed for each gradient that is copied to main memory. Does nothing: the host would wait for
        the device to learn whether the gradient is finite, as the norm tells for all of them."""

    def set_norm_for_param_grad_in_gpu(self, param: Any) -> None:
        """The same for the gradient's norm. Does nothing: DeepSpeed would make an fp64 copy of the gradient on the
        device for a norm of which ours is independent."""

    def async_accumulate_grad_in_cpu_via_gpu(self, param: Any) -> None:
        """Called by DeepSpeed in fp32, where gradient sums are in main memory, for each micro-batch: adds a gradient to
        its sum on the device and copies it back. DeepSpeed has the host wait for all earlier copies each time. All of
        them are in this stream, or this stream waits for them; the host waits once, before the update."""
        pending, self._pending_offload_events = self._pending_offload_events, {}
        stream: Any = get_accelerator().current_stream()  # type: ignore[union-attr]
        for other, event in pending.items():
            if other != stream:
                stream.wait_event(event)
        super().async_accumulate_grad_in_cpu_via_gpu(param)
        self._pending_offload_events = pending | self._pending_offload_events

    def reset_cpu_buffers(self) -> None:
        """Called by DeepSpeed at the end of a step with offload, also of one without an update. DeepSpeed would leave
        the gradient sums of the latter on the device, and the next step would add to them."""
        super().reset_cpu_buffers()
        for group in self.averaged_gradients:
            self.averaged_gradients[group] = None

    def clear_grad_attribute(self, param: Any) -> None:
        """Called by DeepSpeed once a gradient's reduction is queued, to free it."""
        self._keep_until_reduced(param)
        super().clear_grad_attribute(param)

    def copy_grads_in_partition(self, param: Any, group_idx: int | None = None) -> None:
        """The same for a gradient that DeepSpeed replaces by a copy, in fp32 with ZeRO-2. DeepSpeed's copies are parts
        of one buffer for all gradients, of which a backward through one of several chunks, or to the input alone, would
        fill only a part; the rest would be unused memory."""
        self._keep_until_reduced(param)
        group = self._get_param_group_idx(param) if group_idx is None else group_idx
        compact = self._use_compact_grad_partition_buffer(group)
        if self.cpu_offload and compact:
            if self.is_gradient_accumulation_boundary():
                self._copy_sum_to_main_memory(param, group)
            return
        if self.cpu_offload or compact:
            super().copy_grads_in_partition(param, group)
            return
        gradient: Any = self.get_gradient_for_reduction(param)
        gradient.data = gradient.detach().clone()

    def _copy_sum_to_main_memory(self, param: Any, group: int) -> None:
        """With offload: copies this rank's part of a gradient's fp32 sum to where the optimizer reads it. DeepSpeed
        would also compute the part's norm, from an fp64 copy of it on the device."""
        _, _, start, count = self.grad_position[self.get_param_id(param)]
        rank = dist.get_rank(self.real_dp_process_group[group])
        part = self._get_compact_grad_partition_slice(group, rank, self.get_param_id(param), count)
        masters: Any = self.single_partition_of_fp32_groups[group]
        masters.grad.view(-1).narrow(0, start, count).copy_(part, non_blocking=True)
        self._record_gradient_stream(part, get_accelerator().current_stream())  # type: ignore[union-attr]
        self._record_offload_copy()
        self.clear_grad_attribute(param)

    def _keep_until_reduced(self, param: Any) -> None:
        """A gradient larger than a bucket is reduced in its own memory. With overlap_comm the reductions' stream may
        still use that, while the step's stream would give it to the next tensor."""
        gradient = self.get_param_gradient_attribute(param)
        overlaps = self.overlap_comm and not get_accelerator().resolves_data_dependency()  # type: ignore[union-attr]
        if overlaps and gradient is not None and not self._is_in_a_bucket(gradient):
            gradient.record_stream(self.reduction_stream)

    def _is_in_a_bucket(self, gradient: Any) -> bool:
        """Whether a gradient has been copied to a bucket. Its own memory may be larger than itself, such as that of
        query, key and value together."""
        buckets: Any = self.ipg_buckets.values()
        own = gradient.untyped_storage().data_ptr()
        return any(
            own == buffer.untyped_storage().data_ptr()
            for bucket in buckets
            for buffer in bucket.buffer
        )

    def allreduce_and_copy(self, *args: Any, **kwargs: Any) -> None:
        """Called by DeepSpeed for each rank's part of a bucket. With overlap_comm it would have the host wait for the
        device each time, to free gradients that the last bucket's reduction has read; the step's stream, which takes
        their memory next, waits for that reduction, and this one for the gradients."""
        with self._streams_in_order():
            super().allreduce_and_copy(*args, **kwargs)

    def _allreduce_noncontiguous_bucket_preserving_fp32(self, *args: Any, **kwargs: Any) -> None:
        """The same for gradients that are not copied into one buffer."""
        with self._streams_in_order():
            super()._allreduce_noncontiguous_bucket_preserving_fp32(*args, **kwargs)

    @contextmanager
    def _streams_in_order(self) -> Iterator[None]:
        accelerator: Any = get_accelerator()
        if not self.overlap_comm or accelerator.resolves_data_dependency():
            yield
            return
        stream: Any = self.reduction_stream
        wait_for(stream)
        stream.wait_stream(accelerator.current_stream())
        with without_device_waits():
            yield

    def independent_gradient_partition_epilogue(self) -> None:
        """Called by DeepSpeed after a backward that reduces. With overlap_comm the host would wait for all work on the
        device; here the step's stream waits for the reductions' stream."""
        if not self.overlap_comm:
            super().independent_gradient_partition_epilogue()
            return
        self.reduce_ipg_grads()
        wait_for(self.reduction_stream)
        self._clear_previous_reduced_grads()
        self.overlap_comm = False
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.overlap_comm = True

    def shards(self) -> Iterator[Shard]:
        for value, partition, start, count, first in self.fragments():
            state = self.optimizer.state.get(partition, {})
            moments = {
                name: state[name].narrow(0, start, count) for name in MOMENTS if name in state
            }
            yield Shard(value.placement, first, partition.detach().narrow(0, start, count), moments)

    def masters_changed(self) -> None:
        """Copies the masters to the weights that the model computes with (collective over the data axis)."""
        self.update_lp_params()
