"""DeepSpeed's engine around one stage of the model, with our optimizers (zero.py, zero3.py). ZeRO-0 is its plain fp32
path with the same norm and tied sums. `Engine.shards` gives a rank's masters and moments in the same form for every
ZeRO stage. Next: pipeline/, which drives the engine.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor

from megalite.engine.norm import GlobalNorm
from megalite.engine.router_bias import RouterBias
from megalite.engine.tensor_copies import may_differ, take_gradients_of_first
from megalite.engine.zero import MOMENTS, ShardedOptimizer, moments_of
from megalite.engine.zero3 import FullyShardedOptimizer
from megalite.model.transformer import EXPERTS
from megalite.parallel.collectives import sum_over
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Shard, placed

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Fields of DeepSpeed's DynamicLossScaler that change during training."""


class Engine(DeepSpeedEngine):
    """DeepSpeed's engine around one stage (a model/transformer.py Stage, which knows its coordinates in the grid)."""

    _highest_gradients: int | None = None
    router_bias: RouterBias | None = None
    """Set if the model has experts."""
    update_waits_for: Any = None
    """Event recorded after a checkpoint's copies. The next update, which overwrites their source, waits for it on the
    device."""

    def __init__(self, stage: Any, grid: Grid, **kwargs: Any) -> None:
        self.grid = grid
        super().__init__(model=stage, mpu=grid, **kwargs)
        self.global_norm = GlobalNorm((placement for _, placement in placed(stage)), grid.sizes)
        device = torch.device(self.device or "cpu")
        if grid.tensor.size > 1 and may_differ(device):
            self.global_norm.prepare = partial(take_gradients_of_first, grid.tensor, device)
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            ShardedOptimizer.adopt(self.optimizer, self.global_norm, stage.ties)
        elif isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            FullyShardedOptimizer.adopt(self.optimizer, self.global_norm)
            if self.optimizer.swap_optimizer:
                self.make_moments(0)

    def _broadcast_model(self) -> None:
        """Called by DeepSpeed's constructor. Does nothing: the ranks of a data axis already have the same weights."""

    def _configure_distributed_model(self, model: Any) -> None:
        """DeepSpeed shards and reduces experts over groups that it creates with its own MoE layers. Ours are put where
        it reads them. Together with marked parameters (Stage.mark) and a parameter group for them, that is all that its
        path for experts needs."""
        expert, replica = self.grid.expert, self.grid.expert_replica
        if any(placement.has_own_replicas for _, placement in placed(model)):
            groups._EXPERT_PARALLEL_GROUP[EXPERTS] = expert.group
            groups._EXPERT_PARALLEL_GROUP_RANKS[EXPERTS] = list(expert.ranks)
            groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = replica.group
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[EXPERTS] = list(replica.ranks)
            self.has_moe_layers = True
        super()._configure_distributed_model(model)

    @property
    def stage(self) -> Any:
        """The stage that this engine runs."""
        return self.module

    def begin_step(self) -> None:
        """Call before the first forward of a step. The caller marks the last backward with
        `set_gradient_accumulation_boundary` and calls `step` once."""
        if self.hands_over_by_chunk:
            # DeepSpeed counts backwards over all parameters, so it does not recognise a chunk's first backward, and
            # would add to the sums that the last step left here (runtime/zero/stage_1_and_2.py:1855).
            for held in self.optimizer.accumulated_grads_in_cpu.values():  # type: ignore[union-attr]
                held.zero_()
            # With one micro-batch, a chunk's first backward is also its last, and would overwrite another chunk's
            # gradient of the same tied parameter (:2166). So no backward counts as the first.
            self.optimizer.micro_step_id = 0  # type: ignore[union-attr]

    @property
    def hands_over_by_chunk(self) -> bool:
        """Whether each chunk's last backward must count as the step's last. With offload, ZeRO-2 copies gradient sums
        to where the optimizer reads them only in a backward at an accumulation boundary
        (runtime/zero/stage_1_and_2.py:2171)."""
        return self.zero_optimization_stage() == 2 and bool(
            getattr(self.optimizer, "cpu_offload", False)
        )

    def _take_model_step(self, lr_kwargs: Any) -> None:
        """Also advances DeepSpeed's scheduler after a skipped step: the learning rate is a function of the step."""
        if self.update_waits_for is not None:
            self.update_waits_for.wait()  # the step's stream waits, not the host
            self.update_waits_for = None
        super()._take_model_step(lr_kwargs)
        if getattr(self.optimizer, "overflow", False) and self.lr_scheduler is not None:
            self.lr_scheduler.step()

    @property
    def _dynamic_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None if the scale is fixed or there is none."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return scaler if isinstance(scaler, DynamicLossScaler) else None

    @property
    def can_lower_loss_scale(self) -> bool:
        """Whether the loss scale can still be lowered after an overflow."""
        scaler = self._dynamic_scaler
        return scaler is not None and scaler.cur_scale > scaler.min_scale

    def loss_scale_state(self) -> dict[str, Any] | None:
        """State of the dynamic loss scale, from which it resumes exactly; None if there is none."""
        scaler = self._dynamic_scaler
        return None if scaler is None else {name: getattr(scaler, name) for name in SCALER_STATE}

    def restore_loss_scale(self, state: dict[str, Any] | None) -> None:
        """Does nothing if the run or the state has no dynamic loss scale: a run may resume in another precision."""
        if self._dynamic_scaler is not None and state is not None:
            for name in SCALER_STATE:
                setattr(self._dynamic_scaler, name, state[name])

    @property
    def current_loss_scale(self) -> float:
        """The factor by which the loss is multiplied in backward."""
        return float(getattr(self.optimizer, "loss_scale", 1.0))

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """Sends bf16 with ZeRO-1 to the same optimizer as other dtypes, not to BF16_Optimizer, which all-reduces where
        a reduce-scatter is enough and keeps zeroed gradients besides the real ones. With ZeRO, DeepSpeed's own check is
        skipped: it imports Muon, which compiles kernels (one second of each rank's start), to compare with the
        optimizers that were tested with ZeRO. Those that a config allows are among them, or tested here
        (tests/distributed/test_recipes.py)."""
        if self.zero_optimization():
            return "zero_optimization"
        return super()._do_optimizer_sanity_check(basic_optimizer)

    def _reduce_non_expert_gradients(self, grads: Any, elements_per_buffer: int) -> None:
        """ZeRO-0's all-reduce. Skipped on a single rank, where DeepSpeed would copy all gradients twice."""
        if self.grid.replica.size == 1:
            return
        # Unevenly cut tensors are reduced separately, as in zero.py's buckets.
        uneven = {
            value.grad.data_ptr()
            for value, placement in placed(self.stage)
            if placement.uneven and value.grad is not None
        }
        for apart in (False, True):
            some = [grad for grad in grads if (grad.data_ptr() in uneven) == apart]
            if some:
                super()._reduce_non_expert_gradients(some, elements_per_buffer)

    def clip_fp32_gradients(self) -> None:
        """ZeRO-0: sums tied gradients, computes our norm and clips by it as torch's clip_grad_norm_ does. If the update
        is refused, the gradients are set to None, so that the optimizer changes nothing."""
        stage = self.stage
        for value, axis in stage.ties:
            if value.grad is not None:
                sum_over(value.grad, axis)
        gradients = [
            (placement, value.grad) for value, placement in placed(stage) if value.grad is not None
        ]
        norm = self.global_norm(gradients, torch.device(self.device or "cpu"), replicated=True)
        self._global_grad_norm = norm.float()
        found = norm.item()  # in main memory: no wait
        if not math.isfinite(found):
            for value, _ in placed(stage):
                value.grad = None
        elif 0 < (limit := super().gradient_clipping()) < found + 1e-6:
            held = [gradient for _, gradient in gradients]
            torch._foreach_mul_(held, limit / (found + 1e-6))  # type: ignore[attr-defined]

    def shards(self) -> list[Shard]:
        """This rank's shards of masters and moments. With ZeRO-0 every rank of the data axis holds all of them."""
        if self.zero_optimization():
            return list(self.optimizer.shards())  # type: ignore[union-attr]
        held = self._adam.state
        return [
            Shard(
                placement,
                0,
                value.detach().view(-1),
                {
                    name: held[value][name].view(-1)
                    for name in MOMENTS
                    if name in held.get(value, {})
                },
            )
            for value, placement in placed(self.stage)
        ]

    def make_moments(self, steps: int) -> None:
        """Creates the optimizer's state as after `steps` steps, with zero moments, so that `shards` can be filled from
        a checkpoint before the first step (optimizers create it lazily)."""
        optimizer = self._adam
        torchs, fused = (
            type(optimizer).__module__.startswith("torch."),
            optimizer.defaults.get("fused"),
        )
        for number, value in enumerate(self._masters()):
            # A run that rewinds has moments already: their memory is for the new ones.
            optimizer.state.pop(value, None)
            if isinstance(self.optimizer, FullyShardedOptimizer):
                moments = self.optimizer.zero_moments(number)
            else:
                moments = {
                    name: torch.zeros_like(value, requires_grad=False)
                    for name in moments_of(optimizer)
                }
            # torch's fused Adam reads the count on the device, the others on the host.
            count = (
                torch.tensor(float(steps), device=value.device if fused else None)
                if torchs
                else steps
            )
            optimizer.state[value] = {"step": count, **moments}

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
        """Call after writing to `shards`: updates the model's weights (collective)."""
        if self.zero_optimization():
            self.optimizer.masters_changed()  # type: ignore[union-attr]

    def gradient_clipping(self) -> float:
        """ZeRO-0: infinite if clipping is off. DeepSpeed calls `clip_fp32_gradients` only if this is above 0, and the
        norm, the tied sum and the check for NaN are always needed."""
        asked = super().gradient_clipping()
        return asked if asked > 0 or self.zero_optimization() else float("inf")

    @contextmanager
    def weighed(self) -> Iterator[dict[str, int]]:
        """Context manager around one optimizer step. On exit the dict holds `state_bytes`, with gradients at their peak
        over the backwards of the step."""
        self._highest_gradients = 0
        result: dict[str, int] = {}
        try:
            yield result
        finally:
            highest, self._highest_gradients = self._highest_gradients, None
        result.update(self.state_bytes() | {"gradients_bytes": highest})

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """As DeepSpeed's; inside `weighed` it also records the bytes of the gradients."""
        result = super().backward(loss, retain_graph, scale_wrt_gas)
        if self._highest_gradients is not None:
            self._highest_gradients = max(
                self._highest_gradients, self.state_bytes()["gradients_bytes"]
            )
        return result

    def state_bytes(self) -> dict[str, int]:
        """Bytes of this rank's weights, optimizer state (masters and moments) and gradients that are in memory now;
        each storage counts once. Gradients exist between the first backward and the update."""
        seen: set[int] = set()
        values = [value for value, _ in placed(self.stage)]
        weights = [t for value in values for t in (value.data, getattr(value, "ds_tensor", None))]
        moments = [
            state[name] for state in self._adam.state.values() for name in MOMENTS if name in state
        ]
        masters = self._masters()
        buffers = (
            self.optimizer.swap_buffers if isinstance(self.optimizer, FullyShardedOptimizer) else []
        )
        gradients = [
            *(value.grad for value in values),
            *map(_own_sum, values),
            *(master.grad for master in masters),
        ]
        held = [*_tensors_of(vars(self.optimizer))] if self.zero_optimization() else []
        return {
            "weights_bytes": _new_bytes(weights, seen),
            "optimizer_bytes": _new_bytes([*masters, *moments, *buffers], seen),
            # All other tensors of the ZeRO optimizer are gradients, whole or in parts.
            "gradients_bytes": _new_bytes([*gradients, *held], seen),
        }


def _own_sum(value: Any) -> Tensor | None:
    """The fp32 sum of a 16-bit gradient with ZeRO-1; None after the reduction, when it is a view of DeepSpeed's bucket,
    which is only scratch space until the next forward."""
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
    """Bytes of the storages that are not in `seen`, to which they are added. Scalars, flags and meta tensors, which
    have no memory, do not count."""
    total = 0
    for tensor in tensors:
        if (
            tensor is not None
            and tensor.dim() > 0
            and tensor.is_floating_point()
            and not tensor.is_meta
        ):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total
