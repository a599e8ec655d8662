"""DeepSpeed's keys of ZeRO: `zero_optimization` with its offload sections, and `aio`. Next: deepspeed_keys.py."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megalite.config.section import Count, Positive, Section, key

OWN_CHECKPOINTS = "checkpoints are megalite's own; see megalite.train.checkpoint_interval"
NO_EXPERTS = "DeepSpeed's own experts are not used; use megalite.parallel.expert"
REMOVED = "DeepSpeed has removed it"
_CHANGES_RESULT = "it rounds what is communicated, so that results would depend on the layout"
_NVME_PARAM = "parameters in files are not supported; offload_optimizer takes nvme"


def _no_nvme(value: Any) -> Any:
    if value == "nvme":
        raise PydanticCustomError("nvme", "must be none or cpu: {reason}", {"reason": _NVME_PARAM})
    return value


class OffloadOptimizer(Section):
    """`zero_optimization.offload_optimizer`"""

    device: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="Where the optimizer's state is kept between steps: `cpu`: in main memory; `nvme`: in files, only "
        "with stage 3 (docs/nvme.md). The optimizer's step then runs on the CPU.",
    )
    pin_memory: bool | None = key("Use page-locked memory.")
    nvme_path: Annotated[str, Field(min_length=1)] | None = key(
        "Device nvme: a folder on a local disk. A run creates its own folders in it and removes them at the end."
    )
    buffer_count: Positive | None = key(
        "Device nvme: number of page-locked buffers, each as large as the largest sub-group; left out: as many as a "
        "step needs: 3 with Adam, plus 3 each for pipeline_read and pipeline_write."
    )
    pipeline_read: bool | None = key("Device nvme: read the next sub-group during the step of one.")
    pipeline_write: bool | None = key(
        "Device nvme: write a sub-group during the step of the next one."
    )
    refused: ClassVar = {
        "fast_init": f"only for offload_param.device nvme: {_NVME_PARAM}",
        "ratio": "must be 1 or left out: DeepSpeed updates the part that is not offloaded with a second optimizer, "
        "which ignores the learning rate's schedule and is not in checkpoints",
        **dict.fromkeys(("super_offload", "cpuadam_cores_perc"), "SuperOffload is not available"),
    }
    neutral: ClassVar = {"ratio": (1,)}


class OffloadParam(Section):
    """`zero_optimization.offload_param`"""

    device: Annotated[Literal["none", "cpu"], BeforeValidator(_no_nvme)] = Field(
        "none", description="Where the parameters are kept while they are not used."
    )
    pin_memory: bool | None = key("Use page-locked memory.")
    refused: ClassVar = dict.fromkeys(
        ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
        f"only for device nvme: {_NVME_PARAM}",
    )


class ZeroOptimization(Section):
    """`zero_optimization`"""

    stage: int = Field(
        0,
        ge=0,
        le=3,
        description="What is sharded over the data axis: 1: optimizer state; 2: also gradients; 3: also weights. With "
        "pipe > 1: 0 to 2.",
    )
    contiguous_gradients: bool | None = key("Copy gradients into one buffer as they are computed.")
    reduce_scatter: bool | None = key("Use reduce-scatter instead of all-reduce.")
    reduce_bucket_size: Count | None = key(
        "Elements reduced at a time, which is the size of a buffer; left out: 4e7."
    )
    use_multi_rank_bucket_allreduce: bool | None = key(
        "Use one all-reduce instead of a reduce for each owner: fewer messages, twice the bytes. Left out: false."
    )
    allgather_partitions: bool | None = key(
        "After the step, use all-gathers instead of broadcasts."
    )
    allgather_bucket_size: Count | None = key("Elements gathered at a time.")
    overlap_comm: bool | None = key(
        "Reduce gradients bucket by bucket during backward (stage 1: only the last of a step), on a GPU in a separate "
        "stream; below stage 3 with a second bucket. The result is the same. Left out: only with stage 3."
    )
    offload_optimizer: OffloadOptimizer | None = key(
        "Keep the optimizer's state in main memory or in files."
    )
    offload_param: OffloadParam | None = key(
        "Keep the parameters in main memory; only with stage 3."
    )
    sub_group_size: Count | None = key(
        "Stage 3: elements that a rank steps at a time; left out: 1e9, with offload_optimizer.device nvme 1e8."
    )
    ignore_unused_parameters: bool | None = key("Accept parameters that get no gradient.")
    round_robin_gradients: bool | None = key(
        "With offloading, divide the copying of gradients among ranks."
    )
    stage3_prefetch_bucket_size: Count | None = key("Elements to gather ahead of their use.")
    stage3_param_persistence_threshold: Count | None = key(
        "Parameters with fewer elements than this always stay gathered."
    )
    stage3_model_persistence_threshold: Count | None = key(
        "Most elements that always stay gathered, in all."
    )
    stage3_max_live_parameters: Count | None = key("Most elements that are gathered at a time.")
    stage3_max_reuse_distance: Count | None = key(
        "A parameter is released if its next use is at least this many elements away."
    )
    stage3_use_all_reduce_for_fetch_params: bool | None = key("Gather parameters by all-reduce.")
    stage3_allgather_sequential: bool | None = key(
        "Gather parameters one by one, which needs less memory."
    )
    memory_efficient_linear: bool | None = key("Stage 3: use DeepSpeed's linear function.")
    override_module_apply: bool | None = key("Stage 3: use DeepSpeed's Module.apply.")
    log_trace_cache_warnings: bool | None = key("Log when the order of gathers changes.")
    enable_sanity_checks: bool | None = key("Run DeepSpeed's internal checks.")
    refused: ClassVar = {
        "compute_grad_norm": "the norm is always computed, for clipping and metrics.jsonl",
        "zenflow": "ZenFlow is not available: its late updates would change the result",
        "cpu_offload": "deprecated in DeepSpeed; use zero_optimization.offload_optimizer",
        "cpu_offload_param": "deprecated in DeepSpeed; use zero_optimization.offload_param",
        "cpu_offload_use_pin_memory": "deprecated in DeepSpeed; use pin_memory in the offload sections",
        "legacy_stage1": "deprecated in DeepSpeed; leave it out",
        "parameter_alignment": "checkpoints need buffers without padding; leave it out",
        "zero_hpz_partition_size": "a second copy of the weights (hpZ) is not available",
        "save_muon_momentum_buffer_in_memory": "Muon is not available; see optimizer.type",
        "leaf_module": NO_EXPERTS,
        "stage3_module_granularity_threshold": "DeepSpeed then lacks gathered weights when "
        "backward adds up gradients, and the first step fails; leave it out",
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
    """`aio`: how the files of offload_optimizer.device nvme are read and written."""

    block_size: Annotated[int, Field(ge=1024, multiple_of=1024)] | None = key(
        "Bytes of a request; left out: 1 MiB. Sub-groups smaller than a request or than 1 MiB stay in memory."
    )
    queue_depth: Positive | None = key("Requests in flight at a time; left out: 8.")
    intra_op_parallelism: Positive | None = key("Threads that share a tensor; left out: 1.")
    single_submit: bool | None = key("Submit requests one by one; left out: false.")
    overlap_events: bool | None = key(
        "Submit more requests before all earlier ones are complete; left out: true."
    )
    refused: ClassVar = {"use_gds": "only for offload_param.device nvme, which is not supported"}
