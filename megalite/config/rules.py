"""The rules between several keys: the grid, the batch, ZeRO against pipe, the model against the grid.
Types and ranges of single keys are in `sections.py` and `deepspeed_keys.py`.

Each function takes the validated document (or sizes), returns plain values and raises ConfigError with
one line that names the key, the values and the rule.
"""

import os
from math import prod
from pathlib import Path
from typing import Any

from megalite.config.batch_plan import BatchPlan
from megalite.config.context_rules import (
    check_context_heads,
    check_context_keys,
    check_context_length,
)
from megalite.config.data_rules import (
    check_classifier,
    check_data_keys,
    check_objective,
    check_undivided,
)
from megalite.config.deepspeed_keys import DeepSpeedKeys
from megalite.config.document import Document, ModelDims
from megalite.config.expert_rules import (
    check_expert_axis,
    check_experts,
    check_zero_of_experts,
)
from megalite.config.length_rules import check_length_of_run
from megalite.config.optimizer_keys import OPTIMIZERS
from megalite.config.optimizer_rules import (
    NVME_SUB_GROUP_ELEMENTS,
    REDUCE_BUCKET_ELEMENTS,
    buffers_needed,
    check_groups,
    check_optimizer,
    check_precision,
    check_zero,
)
from megalite.config.parallel_keys import Parallel
from megalite.config.pipe_rules import check_layers, check_micro_batches, check_schedule_of_pipe
from megalite.config.rate_rules import check_schedule, warmup_steps
from megalite.config.rate_schedules import Constant
from megalite.config.section import all_of, broken
from megalite.config.sections import Megalite
from megalite.config.stack_rules import check_layout_of_stacks, check_stacks
from megalite.config.zero_keys import ZeroOptimization
from megalite.errors import ConfigError

MOST_MICRO_BATCHES = 100_000  # of a step, since a step is a list of actions for each of them
MOST_RISES = 100_000  # increments of a batch ramp, since batch_plan.py loops over them
FP16_DEFAULTS = {  # DeepSpeed's (runtime/precision_config.py), made explicit because the result depends on them
    "loss_scale": 0.0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}
BATCH_RULE = (
    "train_batch_size = train_micro_batch_size_per_gpu × gradient_accumulation_steps × data axis"
)


def data_axis_size(parallel: Parallel, world_size: int) -> int:
    """Size of the data axis: `world_size` / (pipe × context × tensor), which must divide evenly."""
    factors = {"pipe": parallel.pipe, "tensor": parallel.tensor}
    if parallel.context > 1:
        factors["context"] = parallel.context
    product = prod(factors.values())
    if world_size < 1 or world_size % product:
        words = " × ".join(f"megalite.parallel.{name} {size}" for name, size in factors.items())
        raise ConfigError(f"world size: {world_size}: must be a multiple of {words} = {product}")
    data = world_size // product
    check_expert_axis(parallel, data)
    return data


def batch_sizes(keys: DeepSpeedKeys, data: int) -> tuple[int, int, int]:
    """(train_batch_size, micro-batch size, gradient accumulation steps) for a data axis of `data` ranks.

    If one is left out, it follows from the other two; if only one is given, accumulation is 1, as in DeepSpeed.
    """
    batch = keys.train_batch_size
    micro, accumulation = keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
    if batch is None and micro is None:
        raise ConfigError(
            f"train_batch_size: missing: give it or train_micro_batch_size_per_gpu; {BATCH_RULE} {data}"
        )
    if accumulation is None and (batch is None or micro is None):
        accumulation = 1
    if batch is None:
        assert micro is not None and accumulation is not None
        return micro * accumulation * data, micro, accumulation
    given = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "data axis": data,
    }
    # The batch size is given: the product of the others must equal it, or the missing one follows from it.
    factor, names = 1, []
    for name, value in given.items():
        if value is not None:
            factor *= value
            names.append(f"{name} {value}")
    product = " × ".join(names)
    if micro is not None and accumulation is not None:
        if batch != factor:
            rule = f"must be {product} = {factor}; set one of the three to null to derive it"
            raise broken("train_batch_size", batch, rule)
        return batch, micro, accumulation
    if batch % factor:
        raise broken("train_batch_size", batch, f"must be a multiple of {product} = {factor}")
    return batch, micro or batch // factor, accumulation or batch // factor


def check_document(document: Document) -> None:
    """Every rule between keys that needs neither the world size nor the model."""
    megalite = document.megalite
    zero = document.zero_optimization or ZeroOptimization.model_validate({})
    all_of(
        lambda: check_data_keys(megalite.data),
        lambda: check_classifier(megalite),
        lambda: check_undivided(megalite.parallel, megalite.data),
        lambda: check_length_of_run(megalite),
        lambda: _check_faults(megalite),
        lambda: check_precision(document),
        lambda: check_schedule_of_pipe(megalite.parallel),
        lambda: check_context_keys(megalite.parallel),
        lambda: check_zero(zero, megalite.parallel),
        lambda: check_zero_of_experts(document),
        lambda: check_optimizer(document),
        lambda: check_groups(document),
    )


def _check_faults(megalite: Megalite) -> None:
    faults = megalite.train.faults
    for name in ("not_finite", "spike"):
        if getattr(faults, name) == "rewind" and megalite.data.order == "megatron":
            rule = 'must not be rewind with megalite.data.order "megatron", built for a fixed number of samples'
            raise broken(f"megalite.train.faults.{name}", "rewind", rule)
    if faults.spike != "warn" and faults.spike_factor is None:
        rule = "needs megalite.train.faults.spike_factor"
        raise broken("megalite.train.faults.spike", faults.spike, rule)


def _check_ramp(plan: BatchPlan, micro: int, data: int) -> None:
    """The ramp's batch sizes against train_batch_size, micro-batch and data axis."""
    ramp, key = plan.ramp, "megalite.train.batch_ramp"
    if ramp is None:
        return
    for name in ("start", "increment"):
        if getattr(ramp, name) % (micro * data):
            rule = f"must be a multiple of train_micro_batch_size_per_gpu {micro} × data axis {data} = {micro * data}"
            raise broken(f"{key}.{name}", getattr(ramp, name), rule)
    if ramp.start >= plan.full:
        raise broken(f"{key}.start", ramp.start, f"must be below train_batch_size {plan.full}")
    if (plan.full - ramp.start) % ramp.increment:
        rule = f"must divide train_batch_size {plan.full} - start {ramp.start} = {plan.full - ramp.start}"
        raise broken(f"{key}.increment", ramp.increment, rule)
    if plan.levels > MOST_RISES:
        rule = f"gives {plan.levels:,} increments: must be at most {MOST_RISES:,}"
        raise broken(f"{key}.increment", ramp.increment, rule)


def resolved_keys(document: Document, data: int) -> dict[str, Any]:
    """The JSON of `document` with every value filled in that a run's result or start depends on."""
    batch, micro, accumulation = batch_sizes(document, data)
    plan = BatchPlan(batch, document.megalite.train.batch_ramp)
    _check_ramp(plan, micro, data)
    if accumulation > MOST_MICRO_BATCHES:
        rule = (
            f"must be at most {MOST_MICRO_BATCHES:,}: the micro-batches of a step on one data rank"
        )
        raise broken("gradient_accumulation_steps", accumulation, rule)
    check_micro_batches(document.megalite.parallel, plan, micro, data)
    schedule = check_schedule(document)
    if isinstance(schedule, Constant):
        warmup_steps(document, schedule, plan)
    result = document.model_dump(exclude_none=True)
    result |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    if document.megalite.data.order == "megatron":
        needed = plan.consumed(document.megalite.train.last_step)
        made_for = result["megalite"]["data"].setdefault("megatron_samples", needed)
        if made_for < needed:
            rule = f"must be at least the samples of megalite.train.steps, {needed}"
            raise broken("megalite.data.megatron_samples", made_for, rule)
    _resolve_zero(document, result.setdefault("zero_optimization", {"stage": 0}))
    _resolve_types(result)
    kind, params = result["optimizer"]["type"], result["optimizer"]["params"]
    for name, value in OPTIMIZERS[kind].items():
        if value is not None:
            params.setdefault(name, value)
    if params.get("torch_adam"):
        params.setdefault("fused", True)
    return result


def _resolve_zero(document: Document, zero: dict[str, Any]) -> None:
    """Defaults of `zero_optimization` that are not DeepSpeed's."""
    if zero["stage"] in (1, 2):
        # DeepSpeed's default all-reduces every bucket and keeps a part. Without it, each part is reduced to its owner
        # only, which sends half the bytes.
        zero.setdefault("use_multi_rank_bucket_allreduce", False)
    if zero["stage"] > 0:
        # DeepSpeed's default 5e8 allocates a buffer of 2 GB in fp32 even for a small model.
        zero.setdefault("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)
    offload = document.zero_optimization and document.zero_optimization.offload_optimizer
    if offload and offload.device == "nvme" and document.optimizer is not None:
        # Buffers are as large as the largest sub-group. With DeepSpeed's default 1e9 they would hold in memory what
        # should be in the files.
        zero.setdefault("sub_group_size", NVME_SUB_GROUP_ELEMENTS)
        needed = buffers_needed(offload, document.optimizer)
        zero["offload_optimizer"].setdefault("buffer_count", needed)


def _resolve_types(result: dict[str, Any]) -> None:
    """Defaults of the dtypes for computation and communication."""
    result.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    fp16 = result.get("fp16", {})
    if fp16.get("enabled"):
        for name, value in FP16_DEFAULTS.items():
            fp16.setdefault(name, value)
    if fp16.get("enabled") or result.get("bf16", {}).get("enabled"):
        result.setdefault("communication_data_type", "fp32")


def machine_has_gpu() -> bool:
    """Whether DeepSpeed will find a GPU on this machine: by `DS_ACCELERATOR` if it is set, else by the driver's
    device files (importing torch to find out would take seconds)."""
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator:
        return accelerator != "cpu"
    devices = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
    return any(Path(device).exists() for device in devices)


def check_layout(parallel: Parallel, dims: ModelDims) -> None:
    """The model's sizes against the grid. The vocabulary need not be divisible: its last shard may be smaller."""
    tensor = parallel.tensor
    sizes = {
        "num_attention_heads": dims.num_heads,
        "intermediate_size": dims.intermediate_size,
    }
    if dims.experts and dims.expert_size != dims.intermediate_size:
        sizes["moe_intermediate_size"] = dims.expert_size
    if dims.shared_size:
        sizes["shared_expert_intermediate_size"] = dims.shared_size
    for name, size in sizes.items():
        if size % tensor:
            raise broken("megalite.parallel.tensor", tensor, f"must divide {name} {size}")
    if dims.num_kv_heads % tensor and tensor % dims.num_kv_heads:
        rule = f"must divide num_key_value_heads {dims.num_kv_heads} or be a multiple of it"
        raise broken("megalite.parallel.tensor", tensor, rule)
    if dims.vocabulary_size < tensor:
        rule = f"must be at most vocab_size {dims.vocabulary_size}"
        raise broken("megalite.parallel.tensor", tensor, rule)
    check_layout_of_stacks(parallel, dims)
    check_context_heads(parallel, dims)
    check_layers(parallel, dims.num_layers)


def check_dims(document: Document, dims: ModelDims) -> None:
    """The model's sizes against the grid and the samples."""
    megalite = document.megalite
    check_layout(megalite.parallel, dims)
    check_experts(megalite, dims)
    check_objective(megalite.data, dims)
    check_stacks(megalite, dims)
    length, tensor = megalite.data.sequence_length, megalite.parallel.tensor
    if megalite.parallel.sequence and length % tensor:
        rule = f"must be a multiple of megalite.parallel.tensor {tensor} with megalite.parallel.sequence"
        raise broken("megalite.data.sequence_length", length, rule)
    check_context_length(megalite.parallel, length)
    if dims.max_positions is not None and length > dims.max_positions:
        rule = f"must be at most the model's max_position_embeddings {dims.max_positions}"
        raise broken("megalite.data.sequence_length", length, rule)
