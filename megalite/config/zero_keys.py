"""DeepSpeed's keys of ZeRO: `zero_optimization` with what it offloads, and `aio`. Next: deepspeed_keys.py."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megalite.config.section import Count, Positive, Section, Share, key

OWN_CHECKPOINTS = "checkpoints are megalite's own; see megalite.train.checkpoint_interval"
NO_EXPERTS = "DeepSpeed's own experts are not used; use megalite.parallel.expert"
REMOVED = "DeepSpeed has removed it"
_CHANGES_RESULT = "it would round what is communicated and so change the result with the layout"
_NVME_PARAM = "weights in files have not been tried with megalite; offload_optimizer takes nvme"


def _no_nvme(value: Any) -> Any:
    if value == "nvme":
        raise PydanticCustomError("nvme", "must be none or cpu: {reason}", {"reason": _NVME_PARAM})
    return value


class OffloadOptimizer(Section):
    """`zero_optimization.offload_optimizer`"""

    device: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="Where the optimizer's state lies between steps: `cpu`: main memory; `nvme`: files, stage 3 "
        "(docs/nvme.md). Steps are taken in main memory.",
    )
    pin_memory: bool | None = key("Page-locked memory.")
    ratio: Share | None = key(
        "Share of the state that is offloaded; below 1 with stage 3 and device cpu only."
    )
    nvme_path: Annotated[str, Field(min_length=1)] | None = key(
        "Device nvme: a folder on a disk of the node. A run makes folders of its own in it and removes them at its end."
    )
    buffer_count: Positive | None = key(
        "Device nvme: page-locked buffers, each as large as the largest sub-group; left out: what a step needs, 3 for "
        "Adam, 3 more for pipeline_read and for pipeline_write."
    )
    pipeline_read: bool | None = key("Device nvme: read the next sub-group while one is stepped.")
    pipeline_write: bool | None = key(
        "Device nvme: write a sub-group while the next one is stepped."
    )
    refused: ClassVar = {
        "fast_init": f"it goes with offload_param.device nvme, which is refused: {_NVME_PARAM}",
        **dict.fromkeys(("super_offload", "cpuadam_cores_perc"), "SuperOffload is not available"),
    }


class OffloadParam(Section):
    """`zero_optimization.offload_param`"""

    device: Annotated[Literal["none", "cpu"], BeforeValidator(_no_nvme)] = Field(
        "none", description="Where the parameters lie between their uses."
    )
    pin_memory: bool | None = key("Page-locked memory.")
    refused: ClassVar = dict.fromkeys(
        ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
        f"it goes with device nvme, which is refused: {_NVME_PARAM}",
    )


class ZeroOptimization(Section):
    """`zero_optimization`"""

    stage: int = Field(
        0,
        ge=0,
        le=3,
        description="What is sharded over the data axis: 1 optimizer state, 2 gradients too, 3 weights too. "
        "pipe > 1 takes 0 to 2.",
    )
    contiguous_gradients: bool | None = key("Copy gradients into one buffer as they are made.")
    reduce_scatter: bool | None = key("Reduce-scatter in place of all-reduce.")
    reduce_bucket_size: Count | None = key(
        "Elements reduced at a time, the size of a buffer; left out: 4e7."
    )
    use_multi_rank_bucket_allreduce: bool | None = key(
        "One all-reduce in place of a reduce for each owner: fewer messages, twice the bytes. Left out: false."
    )
    allgather_partitions: bool | None = key("All-gather in place of broadcasts after the step.")
    allgather_bucket_size: Count | None = key("Elements gathered at a time.")
    overlap_comm: bool | None = key(
        "Reduce gradients bucket by bucket while backward runs (stage 1: a step's last one), on a GPU in a stream of "
        "their own; below stage 3 with a second bucket. The result is the same. Left out: with stage 3 alone."
    )
    offload_optimizer: OffloadOptimizer | None = key(
        "Keep the optimizer's state in main memory or in files."
    )
    offload_param: OffloadParam | None = key("Keep the parameters in main memory; stage 3.")
    sub_group_size: Count | None = key(
        "Elements of a rank that are stepped at a time, stage 3; left out: 1e9, with offload_optimizer.device nvme 1e8."
    )
    ignore_unused_parameters: bool | None = key("Take parameters without a gradient as they are.")
    round_robin_gradients: bool | None = key("Share gradient copies among ranks, with offloading.")
    stage3_prefetch_bucket_size: Count | None = key("Elements fetched ahead.")
    stage3_param_persistence_threshold: Count | None = key(
        "Parameters below this many elements stay whole."
    )
    stage3_model_persistence_threshold: Count | None = key("Elements that may stay whole in all.")
    stage3_max_live_parameters: Count | None = key("Elements held whole at a time.")
    stage3_max_reuse_distance: Count | None = key("Elements after which a parameter is released.")
    stage3_use_all_reduce_for_fetch_params: bool | None = key("Fetch by all-reduce.")
    stage3_allgather_sequential: bool | None = key("Fetch parameters one by one: less memory.")
    memory_efficient_linear: bool | None = key("DeepSpeed's own linear function, stage 3.")
    override_module_apply: bool | None = key("DeepSpeed's own Module.apply, stage 3.")
    log_trace_cache_warnings: bool | None = key("Log when the order of fetches changes.")
    enable_sanity_checks: bool | None = key("DeepSpeed's internal checks.")
    refused: ClassVar = {
        "compute_grad_norm": "the norm is always computed: clipping and metrics.jsonl need it",
        "zenflow": "ZenFlow is not available: its late updates would change the result",
        "cpu_offload": "deprecated in DeepSpeed; use zero_optimization.offload_optimizer",
        "cpu_offload_param": "deprecated in DeepSpeed; use zero_optimization.offload_param",
        "cpu_offload_use_pin_memory": "deprecated in DeepSpeed; use pin_memory in the offload sections",
        "legacy_stage1": "deprecated in DeepSpeed; leave it out",
        "parameter_alignment": "checkpoints are read from buffers without padding; leave it out",
        "zero_hpz_partition_size": "a second copy of the weights (hpZ) is not available",
        "save_muon_momentum_buffer_in_memory": "Muon is not available; see optimizer.type",
        "leaf_module": NO_EXPERTS,
        "stage3_module_granularity_threshold": "with it DeepSpeed has not gathered the weights when gradients are "
        "added up in backward: the first step fails",
        **dict.fromkeys(
            (
                "zero_quantized_weights",
                "zero_quantized_nontrainable_weights",
                "zero_quantized_gradients",
            ),
            _CHANGES_RESULT,
        ),
        **dict.fromkeys(
            (
                "load_from_fp32_weights",
                "elastic_checkpoint",
                "pipeline_loading_checkpoint",
                "stage3_gather_16bit_weights_on_model_save",
                "stage3_gather_fp16_weights_on_model_save",
            ),
            OWN_CHECKPOINTS,
        ),
        **dict.fromkeys(
            ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), REMOVED
        ),
    }
    neutral: ClassVar = {
        "compute_grad_norm": (True,),
        "zero_hpz_partition_size": (1,),
        "mics_shard_size": (-1,),
        "stage3_module_granularity_threshold": (0,),
    }


class Aio(Section):
    """`aio`: how files of offload_optimizer.device nvme are read and written."""

    block_size: Annotated[int, Field(ge=1024, multiple_of=1024)] | None = key(
        "Bytes of a request; left out: 1 MiB. Sub-groups of less than that, and of less than 1 MiB, stay in memory."
    )
    queue_depth: Positive | None = key("Requests under way at a time; left out: 8.")
    intra_op_parallelism: Positive | None = key("Threads that share a tensor; left out: 1.")
    single_submit: bool | None = key("Hand requests over one by one; left out: false.")
    overlap_events: bool | None = key(
        "Hand over the next request before all are done; left out: true."
    )
    refused: ClassVar = {"use_gds": "it goes with offload_param.device nvme, which is refused"}
