"""The rules of `optimizer`, `zero_optimization` and the precision: what works together, and what DeepSpeed cannot do.

Each function takes the validated document (or sizes) and raises ConfigError with one line that names the key, its
value and the rule.
"""

from megalite.config.deepspeed_keys import OPTIMIZERS, OffloadOptimizer, Optimizer, ZeroOptimization
from megalite.config.document import Document
from megalite.config.parallel_keys import Parallel
from megalite.config.schedules import DEEPSPEEDS
from megalite.config.section import all_of, broken
from megalite.errors import ConfigError

REDUCE_BUCKET_ELEMENTS = 40_000_000


NVME_SUB_GROUP_ELEMENTS = 100_000_000


NVME_KEYS = {"nvme_path", "buffer_count", "pipeline_read", "pipeline_write"}


def check_precision(document: Document) -> None:
    bf16 = document.bf16 is not None and document.bf16.enabled
    fp16 = document.fp16 is not None and document.fp16.enabled
    if fp16 and bf16:
        raise broken("fp16.enabled", True, "must not be on together with bf16.enabled")
    if (bf16 or fp16) and (
        document.zero_optimization is None or document.zero_optimization.stage == 0
    ):
        raise broken(
            "zero_optimization.stage",
            0,
            f"DeepSpeed does not start ZeRO-0 with {'bf16' if bf16 else 'fp16'} and fp32 accumulation; use stage 1, "
            "same result",
        )
    if document.communication_data_type == "bf16" and not bf16:
        raise broken("communication_data_type", "bf16", "needs bf16.enabled; leave it out")


def check_zero(zero: ZeroOptimization, parallel: Parallel) -> None:
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
            raise broken(
                f"zero_optimization.{name}.device",
                device,
                f"needs zero_optimization.stage {least} or more",
            )
    offload = zero.offload_optimizer
    if offload is not None and offload.ratio is not None and offload.ratio < 1 and zero.stage != 3:
        raise broken(
            "zero_optimization.offload_optimizer.ratio", offload.ratio, "must be 1 below stage 3"
        )


def _check_nvme(document: Document, optimizer: Optimizer) -> None:
    """Optimizer states in files: the keys that go together."""
    zero = document.zero_optimization
    offload = None if zero is None else zero.offload_optimizer
    path = "zero_optimization.offload_optimizer"
    if zero is None or offload is None or offload.device != "nvme":
        given = (
            []
            if offload is None
            else offload.model_dump(exclude_none=True, include=NVME_KEYS).items()
        )
        for name, value in given:
            raise broken(f"{path}.{name}", value, f'needs {path}.device "nvme"')
        if document.aio is not None:
            raise broken(
                "aio", document.aio.model_dump(exclude_none=True), f'needs {path}.device "nvme"'
            )
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
        raise broken(
            f"{path}.buffer_count", offload.buffer_count, " and again for ".join([rule, *pipelines])
        )


def moments_kept(optimizer: Optimizer) -> int:
    """Tensors that the optimizer keeps of each weight."""
    return 2 if optimizer.type != "SGD" else int(bool(optimizer.params.momentum))


def buffers_needed(offload: OffloadOptimizer, optimizer: Optimizer) -> int:
    """Of a step with device nvme: masters and moments of a sub-group, of the one that is read ahead and of the one that
    is still written."""
    return (1 + moments_kept(optimizer)) * (
        1 + bool(offload.pipeline_read) + bool(offload.pipeline_write)
    )


def check_optimizer(document: Document) -> None:
    optimizer = document.optimizer
    if optimizer is None:
        raise ConfigError('optimizer: missing: a run needs {"type": "AdamW", "params": {"lr": …}}')
    all_of(lambda: _check_update(optimizer), lambda: _check_nvme(document, optimizer))


def _check_update(optimizer: Optimizer) -> None:
    for name, value in optimizer.params.model_dump(
        exclude_none=True, exclude={"lr", "weight_decay"}
    ).items():
        if name not in OPTIMIZERS[optimizer.type]:
            raise broken(
                f"optimizer.params.{name}",
                value,
                f"is not a parameter of {optimizer.type}; leave it out",
            )
    if optimizer.type == "AdamW" and optimizer.params.adam_w_mode is False:
        raise broken(
            "optimizer.params.adam_w_mode",
            False,
            "must not be false with type AdamW; use type Adam",
        )
    if optimizer.params.fused is not None and optimizer.params.torch_adam is False:
        raise broken(
            "optimizer.params.fused",
            optimizer.params.fused,
            "must be left out with torch_adam false",
        )


def check_groups(document: Document) -> None:
    scheduler = document.scheduler
    for i, group in enumerate(document.megalite.train.parameter_groups):
        if group.lr_ratio != 1 and scheduler is not None and scheduler.type in DEEPSPEEDS:
            rule = f"must be 1 with DeepSpeed's scheduler.type {scheduler.type}, which sets one rate for all"
            raise broken(f"megalite.train.parameter_groups.{i}.lr_ratio", group.lr_ratio, rule)
