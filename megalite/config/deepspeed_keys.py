"""DeepSpeed's keys that megalite takes, with their types and ranges, and those that it refuses, with why.

DeepSpeed itself ignores an unknown top-level key without a word, so every key that DeepSpeed 0.19.8 reads is here, in
`zero_keys.py` or `optimizer_keys.py`, as a field or as a refusal. `tests/unit/config/test_config.py` compares the
sections with those of the installed package that have types; DeepSpeed is not imported here, so that programs start
quickly. A field that is left out keeps DeepSpeed's default, except those that `rules.py` always writes.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from megalite.config.optimizer_keys import Optimizer
from megalite.config.section import Count, Positive, Rate, Section, key
from megalite.config.zero_keys import NO_EXPERTS, OWN_CHECKPOINTS, REMOVED, Aio, ZeroOptimization

_OWN_METRICS = "metrics go to metrics.jsonl in megalite.train.run_dir"
_OWN_SAMPLES = "samples are made by megalite; see megalite.data"
_OWN_SCALE = "megalite scales gradients itself, by tokens over the global batch; leave it out"


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
        **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula"), OWN_CHECKPOINTS),
        **dict.fromkeys(
            ("data_efficiency", "curriculum_learning", "dataloader_drop_last"), _OWN_SAMPLES
        ),
        **dict.fromkeys(
            ("gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients"), _OWN_SCALE
        ),
        **dict.fromkeys(("expert_parallel", "use_data_before_expert_parallelism"), NO_EXPERTS),
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
            REMOVED,
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
