"""The rules of `optimizer`, `zero_optimization` and the precision: which settings work together in DeepSpeed.

Each function takes the validated document (or sizes) and raises ConfigError with one line that names the key, its
value and the rule.
"""

from megalite.config.document import Document
from megalite.config.optimizer_keys import OPTIMIZERS, Optimizer
from megalite.config.parallel_keys import Parallel
from megalite.config.rate_schedules import DEEPSPEEDS
from megalite.config.section import all_of, broken
from megalite.config.zero_keys import OffloadOptimizer, ZeroOptimization
from megalite.errors import ConfigError

REDUCE_BUCKET_ELEMENTS = 40_000_000
NVME_SUB_GROUP_ELEMENTS = 100_000_000
NVME_KEYS = {"nvme_path", "buffer_count", "pipeline_read", "pipeline_write"}


def check_precision(document: Document) -> None:
    bf16 = document.bf16 is not None and document.bf16.enabled
    fp16 = document.fp16 is not None and document.fp16.enabled
    if fp16 and bf16:
        raise broken("fp16.enabled", True, "must not be on together with bf16.enabled")
    zero = document.zero_optimization
    if (bf16 or fp16) and (zero is None or zero.stage == 0):
        name = "bf16" if bf16 else "fp16"
        rule = f"DeepSpeed does not support ZeRO stage 0 with {name} and fp32 accumulation; use stage 1, same result"
        raise broken("zero_optimization.stage", 0, rule)
    if document.communication_data_type == "bf16" and not bf16:
        raise broken("communication_data_type", "bf16", "needs bf16.enabled true, or leave it out")


def check_zero(zero: ZeroOptimization, parallel: Parallel) -> None:
    pipe = parallel.pipe
    if pipe > 1 and zero.stage == 3:
        rule = (
            f"must be at most 2 with megalite.parallel.pipe {pipe}: each micro-batch would gather the stage's weights "
            "twice, and alternating forward and backward passes would defeat DeepSpeed's prefetching"
        )
        raise broken("zero_optimization.stage", 3, rule)
    for name in ("offload_optimizer", "offload_param"):
        section = getattr(zero, name)
        if section is None or section.device == "none":
            continue
        least = 3 if name == "offload_param" or section.device == "nvme" else 1
        if zero.stage < least:
            rule = f"needs zero_optimization.stage {least} or more"
            raise broken(f"zero_optimization.{name}.device", section.device, rule)


def _check_nvme(document: Document, optimizer: Optimizer) -> None:
    """Rules for optimizer states in files (device nvme)."""
    zero = document.zero_optimization
    offload = None if zero is None else zero.offload_optimizer
    path = "zero_optimization.offload_optimizer"
    if zero is None or offload is None or offload.device != "nvme":
        rule = f'needs {path}.device "nvme"'
        if offload is not None:
            for name, value in offload.model_dump(exclude_none=True, include=NVME_KEYS).items():
                raise broken(f"{path}.{name}", value, rule)
        if document.aio is not None:
            raise broken("aio", document.aio.model_dump(exclude_none=True), rule)
        return
    if offload.nvme_path is None:
        raise ConfigError(f"{path}.nvme_path: missing: device nvme needs a folder for its files")
    needed = buffers_needed(offload, optimizer)
    if offload.buffer_count is not None and offload.buffer_count < needed:
        ways = 1 + bool(offload.pipeline_read) + bool(offload.pipeline_write)
        rule = f"must be at least {needed}: {needed // ways} tensors of a sub-group"
        pipelines = [name for name in ("pipeline_read", "pipeline_write") if getattr(offload, name)]
        rule = ", and as many for ".join([rule, *pipelines])
        raise broken(f"{path}.buffer_count", offload.buffer_count, rule)


def moments_kept(optimizer: Optimizer) -> int:
    """Number of state tensors that the optimizer keeps for each weight."""
    return 2 if optimizer.type != "SGD" else int(bool(optimizer.params.momentum))


def buffers_needed(offload: OffloadOptimizer, optimizer: Optimizer) -> int:
    """Number of buffers for a step with device nvme: for the master weights and moments of the current sub-group, of
    the one being prefetched and of the one being written back."""
    sub_groups = 1 + bool(offload.pipeline_read) + bool(offload.pipeline_write)
    return sub_groups * (1 + moments_kept(optimizer))


def check_optimizer(document: Document) -> None:
    optimizer = document.optimizer
    if optimizer is None:
        raise ConfigError('optimizer: missing: a run needs {"type": "AdamW", "params": {"lr": …}}')
    all_of(lambda: _check_update(optimizer), lambda: _check_nvme(document, optimizer))


def _check_update(optimizer: Optimizer) -> None:
    params, path = optimizer.params, "optimizer.params"
    given = params.model_dump(exclude_none=True, exclude={"lr", "weight_decay"})
    for name, value in given.items():
        if name not in OPTIMIZERS[optimizer.type]:
            rule = f"is not a parameter of {optimizer.type}; leave it out"
            raise broken(f"{path}.{name}", value, rule)
    if optimizer.type == "AdamW" and params.adam_w_mode is False:
        rule = "must not be false with type AdamW; use type Adam"
        raise broken(f"{path}.adam_w_mode", False, rule)
    if params.fused is not None and params.torch_adam is False:
        raise broken(f"{path}.fused", params.fused, "must be left out with torch_adam false")


def check_groups(document: Document) -> None:
    scheduler = document.scheduler
    for i, group in enumerate(document.megalite.train.parameter_groups):
        if group.lr_ratio != 1 and scheduler is not None and scheduler.type in DEEPSPEEDS:
            rule = f"must be 1 with DeepSpeed's scheduler.type {scheduler.type}, which sets one rate for all groups"
            raise broken(f"megalite.train.parameter_groups.{i}.lr_ratio", group.lr_ratio, rule)
