"""DeepSpeed's keys that megalite takes, with their types and ranges, and those that it refuses, with why.

DeepSpeed itself lets an unknown top-level key pass in silence, so every key that DeepSpeed 0.19.8 reads
is here, as a field or as a refusal. `tests/unit/config/test_config.py` compares the sections with those of the
installed package that have types; DeepSpeed is not imported here, for the sake of a quick start. A field left out keeps
DeepSpeed's default, but for those that `rules.py` always writes.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megalite.config.section import Positive, Section, Share

_OWN_CHECKPOINTS = "checkpoints are megalite's own; see megalite.train.checkpoint_interval"
_NO_EXPERTS = "DeepSpeed's own experts are not used; use megalite.parallel.expert"
_REMOVED = "DeepSpeed has removed it"
_OWN_METRICS = "metrics go to metrics.jsonl in megalite.train.run_dir"
_OWN_SAMPLES = "samples are made by megalite; see megalite.data"
_OWN_SCALE = "megalite scales gradients itself, by tokens over the global batch; leave it out"
_CHANGES_RESULT = "it would round what is communicated and so change the result with the layout"


def _whole(value: Any) -> Any:
    """5e8 is how DeepSpeed's own examples write an integer: a float in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_NVME_PARAM = "weights in files have not been tried with megalite; offload_optimizer takes nvme"


def _no_nvme(value: Any) -> Any:
    if value == "nvme":
        raise PydanticCustomError("nvme", "must be none or cpu: {reason}", {"reason": _NVME_PARAM})
    return value


Count = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)]
Rate = Annotated[float, Field(ge=0)]


def key(description: str) -> Any:
    """A field that may be left out: DeepSpeed's default then holds."""
    return Field(None, description=description)


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
        "leaf_module": _NO_EXPERTS,
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
            _OWN_CHECKPOINTS,
        ),
        **dict.fromkeys(
            ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), _REMOVED
        ),
    }
    neutral: ClassVar = {
        "compute_grad_norm": (True,),
        "zero_hpz_partition_size": (1,),
        "mics_shard_size": (-1,),
        "stage3_module_granularity_threshold": (0,),
    }


class Bf16(Section):
    """`bf16`"""

    enabled: bool = Field(
        False, description="Weights and activations in bf16, masters and accumulation in fp32."
    )
    refused: ClassVar = {
        **dict.fromkeys(
            ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
            "masters and moments are kept in fp32",
        ),
        "check_grad_overflow": "gradients are always checked; see megalite.train.faults.not_finite",
        "immediate_grad_update": "it is for DeepSpeed's BF16_Optimizer, which is not used: ZeRO does without",
    }


class Fp16(Section):
    """`fp16`"""

    enabled: bool = Field(
        False,
        description="Weights and activations in fp16, masters and accumulation in fp32, with a loss scale.",
    )
    loss_scale: Rate | None = key("Factor of the loss before backward; 0 (when left out): dynamic.")
    initial_scale_power: Count | None = key(
        "A dynamic scale starts at 2 to this power; left out: 16."
    )
    loss_scale_window: Positive | None = key(
        "Steps without overflow after which it doubles; left out: 1000."
    )
    hysteresis: Positive | None = key("Overflows after which it is halved; left out: 2.")
    consecutive_hysteresis: bool | None = key("Count overflows in a row alone; left out: false.")
    min_loss_scale: Positive | None = key(
        "Lowest dynamic scale; left out: 1. An overflow there, or with a fixed scale, is a gradient not finite: "
        "megalite.train.faults.not_finite."
    )
    refused: ClassVar = {
        "fp16_master_weights_and_grads": "masters and moments are kept in fp32",
        "auto_cast": "a stage's inputs are token ids or already in fp16",
    }


class DataTypes(Section):
    """`data_types`"""

    grad_accum_dtype: Literal["fp32"] = Field(
        "fp32", description="Type that gradients are summed in."
    )
    refused: ClassVar = dict.fromkeys(
        ("param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
        "bf16.enabled and fp16.enabled say the types",
    )


class OptimizerParams(Section):
    """Parameters of the optimizer."""

    lr: float = Field(gt=0, description="Learning rate, the highest of the schedule.")
    weight_decay: Rate = Field(0.0, description="Decay of the weights, times the learning rate.")
    betas: (
        Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
        | None
    ) = key("Adam: decay of the two moments; left out: [0.9, 0.999].")
    eps: float | None = Field(
        None, gt=0, description="Adam: added to the root of the second moment; left out: 1e-8."
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="SGD: decay of the momentum; left out: 0, none."
    )
    adam_w_mode: bool | None = key(
        "With type Adam: true (DeepSpeed's default) decays as AdamW does, false adds it to the gradient."
    )
    torch_adam: bool | None = key(
        "torch's Adam; false: DeepSpeed's, which is compiled at the first start, on a GPU with nvcc. "
        "Left out: true."
    )
    fused: bool | None = key(
        "With torch_adam: each weight is read and written once a step. Left out: true."
    )
    refused: ClassVar = {
        "max_grad_norm": "use gradient_clipping",
        "bias_correction": "it is always on",
        "amsgrad": "not available in DeepSpeed's Adam",
        "fp32_optimizer_states": "masters and moments are kept in fp32",
    }
    neutral: ClassVar = {"bias_correction": (True,)}


ADAM: dict[str, Any] = {
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "adam_w_mode": True,
    "torch_adam": True,
    "fused": None,  # with torch_adam alone
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"AdamW": ADAM, "Adam": ADAM, "SGD": {"momentum": 0.0}}
"""What each takes beside lr and weight_decay, with the defaults."""
REFUSED_OPTIMIZERS = {
    "Muon": "DeepSpeed's makes orthogonal what a rank of the tensor axis holds of a matrix, not the matrix, and from "
    "ZeRO-1 on clips the update in place of the gradient: the result would depend on the layout",
    "Lion": "DeepSpeed's moves a weight whose gradient is 0, as that of an unseen token's embedding, by a whole step",
    "Adagrad": "DeepSpeed rebuilds it for ZeRO and drops the parameter groups: norms and biases would decay",
    "Lamb": "it needs the norms of whole tensors, of which ZeRO gives it parts",
}


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        rule = f"must be one of {', '.join(OPTIMIZERS)}"
        for known, why in REFUSED_OPTIMIZERS.items():
            if known.lower() == name.lower():
                rule = f"{rule}: {why}"
        raise PydanticCustomError("optimizer", "{rule}", {"rule": rule})
    return name


class Optimizer(Section):
    """`optimizer`"""

    type: Annotated[str, AfterValidator(_optimizer)] = Field(
        description="The update rule: `AdamW`, `Adam`, or torch's `SGD`."
    )
    params: OptimizerParams
    refused: ClassVar = {"legacy_fusion": "it belongs to fp16 and LAMB; leave it out"}


class Scheduler(Section):
    """`scheduler`"""

    type: str = Field(
        description="megalite's `constant`, `linear`, `cosine`, `wsd`, `inverse_sqrt`, or DeepSpeed's `WarmupLR`, "
        "`WarmupDecayLR`, `WarmupCosineLR`, `OneCycle`, `LRRangeTest`."
    )
    params: dict[str, Any] = Field({}, description="Parameters of that type.")


class CommsLogger(Section):
    """`comms_logger`"""

    enabled: bool = Field(False, description="Record each collective's bytes and time.")
    prof_all: bool | None = key("All collectives.")
    prof_ops: list[str] | None = key("Names of those recorded, where not all are.")
    verbose: bool | None = key("A line for each call.")
    debug: bool | None = key("With the caller's name.")


class ThroughputTimer(Section):
    """`timers.throughput`"""

    enabled: bool | None = key("DeepSpeed's own timer.")
    synchronized: bool | None = key("Wait for the device each micro-batch: exact and slower.")


class Timers(Section):
    """`timers`"""

    throughput: ThroughputTimer | None = key("Throughput timer.")


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


class DeepSpeedKeys(Section):
    """The top level of the JSON, without `megalite`. Of the three batch sizes two are enough; null: left out."""

    train_batch_size: Positive | None = key("Samples of an optimizer step, over all ranks.")
    train_micro_batch_size_per_gpu: Positive | None = key(
        "Samples of a micro-batch on one data rank."
    )
    gradient_accumulation_steps: Positive | None = key("Micro-batches of a step on one data rank.")
    gradient_clipping: Rate = Field(
        1.0, description="Highest global norm of the gradients; 0: no clipping."
    )
    optimizer: Optimizer | None = key("The optimizer; a run must have one.")
    scheduler: Scheduler | None = key("The learning rate over the steps; left out: constant.")
    zero_optimization: ZeroOptimization | None = key("ZeRO; left out: stage 0.")
    bf16: Bf16 | None = key("bf16; left out: fp32.")
    fp16: Fp16 | None = key("fp16; left out: fp32.")
    data_types: DataTypes | None = key("Type that gradients are summed in: fp32.")
    communication_data_type: Literal["fp32", "bf16"] | None = key(
        "Type that gradients travel in; fp32 when left out, bf16 with bf16.enabled only."
    )
    steps_per_print: Positive = Field(
        1_000_000_000,
        description="Steps between DeepSpeed's own lines; megalite prints its own progress.",
    )
    wall_clock_breakdown: bool | None = key(
        "DeepSpeed logs the time of forward, backward and step."
    )
    memory_breakdown: bool | None = key("DeepSpeed logs its memory.")
    dump_state: bool | None = key("DeepSpeed logs its whole state after starting.")
    disable_python_gc: bool | None = key("Switch Python's garbage collector off while training.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = key(
        "Level of DeepSpeed's log."
    )
    comms_logger: CommsLogger | None = key("DeepSpeed's record of collectives.")
    timers: Timers | None = key("DeepSpeed's timers.")
    aio: Aio | None = key("Reading and writing with offload_optimizer.device nvme.")
    refused: ClassVar = {
        "activation_checkpointing": "use megalite.train.activation_checkpointing",
        "tensor_parallel": "megalite splits the layers itself; use megalite.parallel.tensor",
        "pipeline": "use megalite.parallel.pipe",
        "sequence_parallel_size": 'use megalite.parallel.context with context_attention "heads"',
        "seq_parallel_communication_data_type": "use megalite.parallel.context",
        "bfloat16": "DeepSpeed's old name; use bf16",
        "amp": "DeepSpeed has removed it; use bf16 or fp16",
        "torch_autocast": "use bf16 or fp16",
        "tensorboard": "use megalite.train.tensorboard",
        **dict.fromkeys(("wandb", "csv_monitor", "comet"), _OWN_METRICS),
        "flops_profiler": _OWN_METRICS,
        **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula"), _OWN_CHECKPOINTS),
        **dict.fromkeys(
            ("data_efficiency", "curriculum_learning", "dataloader_drop_last"), _OWN_SAMPLES
        ),
        **dict.fromkeys(
            ("gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients"), _OWN_SCALE
        ),
        **dict.fromkeys(("expert_parallel", "use_data_before_expert_parallelism"), _NO_EXPERTS),
        **dict.fromkeys(
            (
                "compression_training",
                "quantize_training",
                "sparse_gradients",
                "eigenvalue",
                "sparse_attention",
                "graph_harvesting",
                "progressive_layer_drop",
            ),
            _REMOVED,
        ),
        "elasticity": "DeepSpeed has removed it; any layout resumes from any checkpoint",
        "autotuning": "not available: it would start runs of its own",
        "hybrid_engine": "not available: it generates inside training; use launcher/generate.py",
        "weight_quantization": "not available: training only",
        "compile": "DeepCompile is not available",
        "managed_gradient_accumulation": "megalite counts the micro-batches with DeepSpeed; leave it out",
        "zero_allow_untested_optimizer": "optimizer.type is one that DeepSpeed tests; leave it out",
        "zero_force_ds_cpu_optimizer": "the optimizer is built from optimizer.type; leave it out",
        "disable_allgather": "without effect in DeepSpeed; use zero_optimization.allgather_partitions",
        "allgather_size": "DeepSpeed's old name; use zero_optimization.allgather_bucket_size",
        "vocabulary_size": "the model's config says it: megalite.model",
    }
    neutral: ClassVar = {
        "gradient_predivide_factor": (1,),
        "sequence_parallel_size": (1,),
        "managed_gradient_accumulation": (True,),
    }
