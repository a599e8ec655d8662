"""The rules that tie several keys together: the grid, the batch, ZeRO against pipe, the model against
the grid. Types and ranges of single keys are in `sections.py` and `deepspeed_keys.py`.

Each function takes the validated document (or sizes), returns plain values and raises ConfigError with
one line that names the key, the values and the rule.
"""

import os
from pathlib import Path
from typing import Any, Protocol

from megalite.config.batches import BatchPlan
from megalite.config.deepspeed_keys import OPTIMIZERS, DeepSpeedKeys, OffloadOptimizer, Optimizer, ZeroOptimization
from megalite.config.pipe_rules import check_layers, check_micro_batches, check_schedule_of_pipe
from megalite.config.schedules import DEEPSPEEDS, SCHEDULES, WSD, Constant, InverseSqrt, Linear
from megalite.config.section import Section, Wrong, all_of, broken, nearest, parse, read
from megalite.config.sections import Data, Masked, Megalite, Parallel
from megalite.errors import ConfigError

LEAST_SHARE = 1e-6  # of a corpus of a blend: below it, data/blend.py would walk through millions of positions
MOST_RISES = 100_000  # of a batch's ramp, through which batches.py walks
REDUCE_BUCKET_ELEMENTS = 40_000_000
NVME_SUB_GROUP_ELEMENTS = 100_000_000
NVME_KEYS = {"nvme_path", "buffer_count", "pipeline_read", "pipeline_write"}
FP16_DEFAULTS = {  # DeepSpeed's (runtime/precision_config.py), written down since the result hangs on them
    "loss_scale": 0.0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}
BATCH_RULE = "train_batch_size = train_micro_batch_size_per_gpu × gradient_accumulation_steps × data axis"


class Document(DeepSpeedKeys):
    """The whole JSON: DeepSpeed's keys, and ours under `megalite`."""

    megalite: Megalite


class ModelDims(Protocol):
    """The sizes of a model that the rules need."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def family(self) -> str: ...
    @property
    def causal(self) -> bool: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...


def data_axis_size(parallel: Parallel, world_size: int) -> int:
    """Ranks of the data axis: `world_size` / (pipe × tensor), which must come out even."""
    pipe, tensor = parallel.pipe, parallel.tensor
    if world_size < 1 or world_size % (pipe * tensor):
        raise ConfigError(
            f"world size: {world_size}: must be a multiple of megalite.parallel.pipe {pipe} × "
            f"megalite.parallel.tensor {tensor} = {pipe * tensor}"
        )
    return world_size // (pipe * tensor)


def batch_sizes(keys: DeepSpeedKeys, data: int) -> tuple[int, int, int]:
    """(train_batch_size, micro-batch, accumulation) for a data axis of `data` ranks.

    Any one that is left out follows from the other two; with one alone accumulation is 1, as in DeepSpeed.
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
    factor, names = 1, []
    for name, value in given.items():
        if value is not None:
            factor *= value
            names.append(f"{name} {value}")
    product = " × ".join(names)
    if micro is not None and accumulation is not None:
        if batch != factor:
            raise broken(
                "train_batch_size",
                batch,
                f"must be {product} = {factor}; set one of the three to null to derive it",
            )
        return batch, micro, accumulation
    if batch % factor:
        raise broken("train_batch_size", batch, f"must be a multiple of {product} = {factor}")
    return batch, micro or batch // factor, accumulation or batch // factor


def wrong_schedule(value: Any) -> Wrong:
    """What is wrong with `scheduler.params` of a whole JSON, of which other parts may be wrong too."""
    scheduler = value.get("scheduler") if isinstance(value, dict) else None
    kind, params = (scheduler.get("type"), scheduler.get("params")) if isinstance(scheduler, dict) else (None, None)
    if not isinstance(kind, str) or kind not in SCHEDULES or not isinstance(params, dict):
        return {}
    _, wrong = read(SCHEDULES[kind], params, "scheduler.params")
    return {("scheduler", "params", *place): line for place, line in wrong.items()}


def check_schedule(document: Document) -> Section | None:
    """The parameters of `scheduler` as the section of its type; None where there is no scheduler."""
    scheduler = document.scheduler
    if scheduler is None:
        return None
    if scheduler.type not in SCHEDULES:
        near = nearest(scheduler.type, SCHEDULES)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise broken("scheduler.type", scheduler.type, f"must be one of {', '.join(SCHEDULES)}{hint}")
    params = parse(SCHEDULES[scheduler.type], scheduler.params, "scheduler.params")
    if isinstance(params, Constant):
        _check_own_schedule(params)
    warmup_key = "warmup_steps" if hasattr(params, "warmup_steps") else "warmup_num_steps"
    total_key = "total_steps" if hasattr(params, "total_steps") else "total_num_steps"
    if hasattr(params, total_key):
        total = getattr(params, total_key) or document.megalite.train.steps
        warmup = getattr(params, warmup_key)
        if warmup is not None:
            _check_fall(params, f"scheduler.params.{warmup_key}", warmup, warmup, total, total_key)
    return params


def _check_own_schedule(params: Constant) -> None:
    if params.warmup_tokens is not None and params.warmup_steps > 0:
        raise broken("scheduler.params.warmup_tokens", params.warmup_tokens, "must not stand beside warmup_steps")
    if isinstance(params, WSD) and params.decay_steps is not None and params.decay_share is not None:
        raise broken("scheduler.params.decay_share", params.decay_share, "must not stand beside decay_steps")
    unscaled = isinstance(params, InverseSqrt) and params.timescale_steps is None
    if unscaled and params.warmup_steps == 0 and params.warmup_tokens is None:
        raise ConfigError("scheduler.params.timescale_steps: missing: give it, warmup_steps or warmup_tokens")


def decay_steps(params: WSD, total: int) -> int:
    """Steps of the decay, of `total` of the schedule."""
    return params.decay_steps or max(1, round((params.decay_share or 0.1) * total))


def _check_fall(params: Section, key: str, value: int, warmup: int, total: int, total_key: str = "total_steps") -> None:
    """`value` of `key` makes a warm-up of `warmup` steps: they must leave room for what follows."""
    if isinstance(params, WSD) and (params.decay_steps or 0) > total:
        raise broken("scheduler.params.decay_steps", params.decay_steps, f"must be at most {total_key} {total}")
    so_many = "" if value == warmup else f"makes {warmup} steps of warm-up: "
    if isinstance(params, WSD) and warmup + decay_steps(params, total) > total:
        rule = f"and the decay's {decay_steps(params, total)} steps must be at most {total_key} {total} together"
        raise broken(key, value, f"{so_many}{rule}")
    if warmup > total:
        rule = f"must be at most {total_key} {total} (megalite.train.steps where it is left out)"
        raise broken(key, value, f"{so_many}{rule}")


def warmup_steps(document: Document, params: Constant, plan: BatchPlan) -> int:
    """Steps of the warm-up, also where it is counted in tokens. ConfigError where it is too long for the schedule."""
    megalite = document.megalite
    if params.warmup_tokens is None:
        return params.warmup_steps
    steps = plan.steps(-(-params.warmup_tokens // megalite.data.sequence_length))
    if isinstance(params, Linear):
        total = params.total_steps or megalite.train.steps
        _check_fall(params, "scheduler.params.warmup_tokens", params.warmup_tokens, steps, total)
    return steps


def check_document(document: Document) -> None:
    """Every rule between keys that needs neither the world size nor the model."""
    megalite, zero = document.megalite, document.zero_optimization or ZeroOptimization.model_validate({})
    all_of(
        lambda: check_data_keys(megalite.data),
        lambda: _check_faults(megalite),
        lambda: _check_precision(document),
        lambda: check_schedule_of_pipe(megalite.parallel),
        lambda: _check_zero(zero, megalite.parallel),
        lambda: _check_optimizer(document),
        lambda: _check_groups(document),
    )


def check_data_keys(data: Data) -> None:
    if data.eod_mask_loss and data.tokenizer is None:
        raise broken("megalite.data.eod_mask_loss", True, "needs megalite.data.tokenizer, which names the token")
    if data.megatron_samples is not None and data.order != "megatron":
        raise broken("megalite.data.megatron_samples", data.megatron_samples, 'needs megalite.data.order "megatron"')
    if data.samples == "packed" and not data.reset_attention:
        raise broken("megalite.data.samples", "packed", "needs megalite.data.reset_attention true")
    if data.samples != "windows" and data.order == "megatron":
        raise broken("megalite.data.samples", data.samples, 'must be "windows" with megalite.data.order "megatron"')
    _check_masked(data)
    for name, sources in (("train", data.train), ("valid", data.valid)):
        for i, source in enumerate(sources):
            if source.split is not None and source.split[0] >= source.split[1]:
                raise broken(f"megalite.data.{name}.{i}.split", source.split, "must be [from, to] with from < to")
    least, total = min(source.weight for source in data.train), sum(source.weight for source in data.train)
    if least < LEAST_SHARE * total:
        i = next(i for i, source in enumerate(data.train) if source.weight == least)
        rule = f"must be at least {LEAST_SHARE:g} of the sum of weights {total:g}"
        raise broken(f"megalite.data.train.{i}.weight", least, rule)


def _check_masked(data: Data) -> None:
    """What goes together with masked language modelling."""
    objective = data.objective
    if not isinstance(objective, Masked):
        return
    path = "megalite.data.objective"
    if objective.keep + objective.swap > 1:
        raise broken(f"{path}.keep", objective.keep, f"must be at most 1 together with {path}.swap {objective.swap}")
    if data.tokenizer is None and objective.mask_token_id is None:
        raise ConfigError(f"{path}.mask_token_id: missing: give it or megalite.data.tokenizer, which has a mask token")
    with_masks = f"with a masked {path}"
    if data.samples != "windows" and not data.reset_attention:
        rule = f"needs megalite.data.reset_attention true {with_masks}: a token would see the filling"
        raise broken("megalite.data.samples", data.samples, rule)
    for key, value, only in (("order", data.order, "shuffled"), ("loss", data.loss or "all", "all")):
        if value != only:
            raise broken(f"megalite.data.{key}", value, f'must be "{only}" {with_masks}')
    if data.eod_mask_loss:
        rule = f"must be false {with_masks}: special tokens are never masked"
        raise broken("megalite.data.eod_mask_loss", True, rule)


def check_objective(data: Data, dims: ModelDims) -> None:
    """What is asked for against what a token sees."""
    if dims.causal and isinstance(data.objective, Masked):
        value = data.objective.model_dump(exclude_none=True)
        rule = f"needs an encoder, such as bert: a {dims.family} model sees only what is before a token"
        raise broken("megalite.data.objective", value, rule)
    if not dims.causal and data.objective == "causal":
        rule = f'must be {{"masked": 0.15}} or the like with a {dims.family} model, which sees what is asked for'
        raise broken("megalite.data.objective", "causal", rule)


def _check_faults(megalite: Megalite) -> None:
    faults = megalite.train.faults
    for name in ("not_finite", "spike"):
        if getattr(faults, name) == "rewind" and megalite.data.order == "megatron":
            rule = 'must not be rewind with megalite.data.order "megatron", made for a given number of samples'
            raise broken(f"megalite.train.faults.{name}", "rewind", rule)
    if faults.spike != "warn" and faults.spike_factor is None:
        raise broken("megalite.train.faults.spike", faults.spike, "needs megalite.train.faults.spike_factor")


def _check_precision(document: Document) -> None:
    bf16 = document.bf16 is not None and document.bf16.enabled
    fp16 = document.fp16 is not None and document.fp16.enabled
    if fp16 and bf16:
        raise broken("fp16.enabled", True, "must not be on together with bf16.enabled")
    if (bf16 or fp16) and (document.zero_optimization is None or document.zero_optimization.stage == 0):
        raise broken(
            "zero_optimization.stage",
            0,
            f"DeepSpeed does not start ZeRO-0 with {'bf16' if bf16 else 'fp16'} and fp32 accumulation; use stage 1, "
            "same result",
        )
    if document.communication_data_type == "bf16" and not bf16:
        raise broken("communication_data_type", "bf16", "needs bf16.enabled; leave it out")


def _check_zero(zero: ZeroOptimization, parallel: Parallel) -> None:
    pipe = parallel.pipe
    offloads = {
        name
        for name in ("offload_optimizer", "offload_param")
        if (section := getattr(zero, name)) is not None and section.device != "none"
    }
    if pipe > 1 and zero.stage == 3:
        raise broken(
            "zero_optimization.stage",
            3,
            f"must be at most 2 with megalite.parallel.pipe {pipe}: each micro-batch would gather the stage's weights "
            "again, twice, and forwards and backwards in turn would undo DeepSpeed's order of fetches",
        )
    for name in sorted(offloads):
        device = getattr(zero, name).device
        least = 3 if name == "offload_param" or device == "nvme" else 1
        if zero.stage < least:
            raise broken(f"zero_optimization.{name}.device", device, f"needs zero_optimization.stage {least} or more")
    offload = zero.offload_optimizer
    if offload is not None and offload.ratio is not None and offload.ratio < 1 and zero.stage != 3:
        raise broken("zero_optimization.offload_optimizer.ratio", offload.ratio, "must be 1 below stage 3")


def _check_nvme(document: Document, optimizer: Optimizer) -> None:
    """Optimizer states in files: the keys that go together."""
    zero = document.zero_optimization
    offload = None if zero is None else zero.offload_optimizer
    path = "zero_optimization.offload_optimizer"
    if zero is None or offload is None or offload.device != "nvme":
        given = [] if offload is None else offload.model_dump(exclude_none=True, include=NVME_KEYS).items()
        for name, value in given:
            raise broken(f"{path}.{name}", value, f'needs {path}.device "nvme"')
        if document.aio is not None:
            raise broken("aio", document.aio.model_dump(exclude_none=True), f'needs {path}.device "nvme"')
        return
    if offload.nvme_path is None:
        raise ConfigError(f"{path}.nvme_path: missing: device nvme needs a folder for its files")
    if offload.ratio is not None and offload.ratio < 1:
        raise broken(f"{path}.ratio", offload.ratio, "must be 1 with device nvme")
    needed = buffers_needed(offload, optimizer)
    if offload.buffer_count is not None and offload.buffer_count < needed:
        ways = 1 + bool(offload.pipeline_read) + bool(offload.pipeline_write)
        rule = f"must be at least {needed}: {needed // ways} tensors of a sub-group"
        pipelines = [name for name in ("pipeline_read", "pipeline_write") if getattr(offload, name)]
        raise broken(f"{path}.buffer_count", offload.buffer_count, " and again for ".join([rule, *pipelines]))


def moments_kept(optimizer: Optimizer) -> int:
    """Tensors that the optimizer keeps of each weight."""
    return 2 if optimizer.type != "SGD" else int(bool(optimizer.params.momentum))


def buffers_needed(offload: OffloadOptimizer, optimizer: Optimizer) -> int:
    """Of a step with device nvme: masters and moments of a sub-group, of the one that is read ahead and of the one that
    is still written."""
    return (1 + moments_kept(optimizer)) * (1 + bool(offload.pipeline_read) + bool(offload.pipeline_write))


def _check_optimizer(document: Document) -> None:
    optimizer = document.optimizer
    if optimizer is None:
        raise ConfigError('optimizer: missing: a run needs {"type": "AdamW", "params": {"lr": …}}')
    all_of(lambda: _check_update(optimizer), lambda: _check_nvme(document, optimizer))


def _check_update(optimizer: Optimizer) -> None:
    for name, value in optimizer.params.model_dump(exclude_none=True, exclude={"lr", "weight_decay"}).items():
        if name not in OPTIMIZERS[optimizer.type]:
            raise broken(f"optimizer.params.{name}", value, f"is not a parameter of {optimizer.type}; leave it out")
    if optimizer.type == "AdamW" and optimizer.params.adam_w_mode is False:
        raise broken(
            "optimizer.params.adam_w_mode", False, "must not be false with type AdamW; use type Adam"
        )
    if optimizer.params.fused is not None and optimizer.params.torch_adam is False:
        raise broken("optimizer.params.fused", optimizer.params.fused, "must be left out with torch_adam false")


def _check_groups(document: Document) -> None:
    scheduler = document.scheduler
    for i, group in enumerate(document.megalite.train.parameter_groups):
        if group.lr_ratio != 1 and scheduler is not None and scheduler.type in DEEPSPEEDS:
            rule = f"must be 1 with DeepSpeed's scheduler.type {scheduler.type}, which sets one rate for all"
            raise broken(f"megalite.train.parameter_groups.{i}.lr_ratio", group.lr_ratio, rule)


def _check_ramp(plan: BatchPlan, micro: int, data: int) -> None:
    """The ramp's batches against train_batch_size and what the ranks compute at a time."""
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
        raise broken(f"{key}.increment", ramp.increment, f"makes {plan.levels:,} rises: must be at most {MOST_RISES:,}")


def resolved_keys(document: Document, data: int) -> dict[str, Any]:
    """The JSON of `document` with everything written that a run's result or start depends on."""
    batch, micro, accumulation = batch_sizes(document, data)
    plan = BatchPlan(batch, document.megalite.train.batch_ramp)
    _check_ramp(plan, micro, data)
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
        needed = plan.consumed(document.megalite.train.steps)
        made_for = result["megalite"]["data"].setdefault("megatron_samples", needed)
        if made_for < needed:
            rule = f"must be at least the samples of megalite.train.steps, {needed}"
            raise broken("megalite.data.megatron_samples", made_for, rule)
    zero = result.setdefault("zero_optimization", {"stage": 0})
    if zero["stage"] in (1, 2):
        # DeepSpeed's default all-reduces every bucket and keeps a part; so each part goes to its owner alone, half
        # of the bytes.
        zero.setdefault("use_multi_rank_bucket_allreduce", False)
    if zero["stage"] > 0:
        # DeepSpeed's 5e8 is a buffer of 2 GB in fp32, whatever the model.
        zero.setdefault("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)
    offload = document.zero_optimization and document.zero_optimization.offload_optimizer
    if offload and offload.device == "nvme" and document.optimizer is not None:
        # Buffers are as large as the largest sub-group: with DeepSpeed's 1e9 they hold what the files are to hold.
        zero.setdefault("sub_group_size", NVME_SUB_GROUP_ELEMENTS)
        zero["offload_optimizer"].setdefault("buffer_count", buffers_needed(offload, document.optimizer))
    result.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    fp16 = result.get("fp16", {})
    if fp16.get("enabled"):
        for name, value in FP16_DEFAULTS.items():
            fp16.setdefault(name, value)
    if fp16.get("enabled") or result.get("bf16", {}).get("enabled"):
        result.setdefault("communication_data_type", "fp32")
    kind, params = result["optimizer"]["type"], result["optimizer"]["params"]
    for name, value in OPTIMIZERS[kind].items():
        if value is not None:
            params.setdefault(name, value)
    if params.get("torch_adam"):
        params.setdefault("fused", True)
    return result


def machine_has_gpu() -> bool:
    """Whether DeepSpeed will find a GPU here: `DS_ACCELERATOR` where it is set, else the driver's device
    files (torch would take seconds to say the same)."""
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator:
        return accelerator != "cpu"
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"))


def check_layout(parallel: Parallel, dims: ModelDims) -> None:
    """The model's sizes against the grid. The vocabulary need not divide: its last slice may be smaller."""
    tensor = parallel.tensor
    for name, size in (
        ("num_attention_heads", dims.num_heads),
        ("intermediate_size", dims.intermediate_size),
    ):
        if size % tensor:
            raise broken("megalite.parallel.tensor", tensor, f"must divide {name} {size}")
    if dims.num_kv_heads % tensor and tensor % dims.num_kv_heads:
        rule = f"must divide num_key_value_heads {dims.num_kv_heads} or be a multiple of it"
        raise broken("megalite.parallel.tensor", tensor, rule)
    if dims.vocabulary_size < tensor:
        raise broken("megalite.parallel.tensor", tensor, f"must be at most vocab_size {dims.vocabulary_size}")
    check_layers(parallel, dims.num_layers)


def check_dims(document: Document, dims: ModelDims) -> None:
    """The model's sizes against the grid and the samples."""
    megalite = document.megalite
    check_layout(megalite.parallel, dims)
    check_objective(megalite.data, dims)
    length, tensor = megalite.data.sequence_length, megalite.parallel.tensor
    if megalite.parallel.sequence and length % tensor:
        rule = f"must be a multiple of megalite.parallel.tensor {tensor} with megalite.parallel.sequence"
        raise broken("megalite.data.sequence_length", length, rule)
    if dims.max_positions is not None and length > dims.max_positions:
        rule = f"must be at most the model's max_position_embeddings {dims.max_positions}"
        raise broken("megalite.data.sequence_length", length, rule)
