"""DeepSpeed's keys that megalite accepts, with their types and ranges, and those that it refuses, with the reasons.

DeepSpeed itself silently ignores unknown top-level keys, so every key that DeepSpeed 0.19.8 reads is here, in
`zero_keys.py` or in `optimizer_keys.py`, as a field or a refusal. `tests/unit/config/test_config.py` compares the
sections with the typed ones of the installed package; DeepSpeed is not imported here, so that programs start quickly. A
field that is left out keeps DeepSpeed's default, except those that `rules.py` always writes.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from megalite.config.optimizer_keys import Optimizer
from megalite.config.section import Count, Positive, Rate, Section, key
from megalite.config.zero_keys import NO_EXPERTS, OWN_CHECKPOINTS, REMOVED, Aio, ZeroOptimization

_OWN_METRICS = "metrics go to metrics.jsonl in megalite.train.run_dir"
_OWN_SAMPLES = "megalite makes the samples itself; see megalite.data"
_OWN_SCALE = "megalite scales gradients itself, by the tokens of the global batch; leave it out"


class Bf16(Section):
    """`bf16`"""

    enabled: bool = Field(
        False,
        description="Weights and activations in bf16; master weights and gradient accumulation in fp32.",
    )
    refused: ClassVar = {
        **dict.fromkeys(
            ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
            "master weights and moments are kept in fp32",
        ),
        "check_grad_overflow": "gradients are always checked; see megalite.train.faults.not_finite",
        "immediate_grad_update": "only for DeepSpeed's BF16_Optimizer, which megalite does not use; leave it out",
    }


class Fp16(Section):
    """`fp16`"""

    enabled: bool = Field(
        False,
        description="Weights and activations in fp16, with a loss scale; master weights and gradient accumulation in "
        "fp32.",
    )
    loss_scale: Rate | None = key("Factor of the loss before backward; 0: dynamic. Left out: 0.")
    initial_scale_power: Count | None = key(
        "A dynamic loss scale starts at 2 to this power; left out: 16."
    )
    loss_scale_window: Positive | None = key(
        "Steps without overflow after which a dynamic loss scale doubles; left out: 1000."
    )
    hysteresis: Positive | None = key(
        "Overflows after which a dynamic loss scale is halved; left out: 2."
    )
    consecutive_hysteresis: bool | None = key(
        "Count only consecutive overflows for `hysteresis`; left out: false."
    )
    min_loss_scale: Positive | None = key(
        "Lowest dynamic loss scale; left out: 1. An overflow at this scale, or with a fixed one, counts as a gradient "
        "that is not finite: megalite.train.faults.not_finite."
    )
    refused: ClassVar = {
        "fp16_master_weights_and_grads": "master weights and moments are kept in fp32",
        "auto_cast": "a stage's inputs are token ids or already in fp16",
    }


class DataTypes(Section):
    """`data_types`"""

    grad_accum_dtype: Literal["fp32"] = Field(
        "fp32", description="Data type in which gradients are summed."
    )
    refused: ClassVar = dict.fromkeys(
        ("param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
        "bf16.enabled and fp16.enabled determine the data types",
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
    prof_all: bool | None = key("Record all collectives.")
    prof_ops: list[str] | None = key("Names of the collectives to record, if prof_all is false.")
    verbose: bool | None = key("Log a line for each call.")
    debug: bool | None = key("Log the caller's name with each call.")


class ThroughputTimer(Section):
    """`timers.throughput`"""

    enabled: bool | None = key("DeepSpeed's throughput timer.")
    synchronized: bool | None = key("Wait for the device at each micro-batch: exact, but slower.")


class Timers(Section):
    """`timers`"""

    throughput: ThroughputTimer | None = key("DeepSpeed's throughput timer.")


class DeepSpeedKeys(Section):
    """The top level of the JSON, without `megalite`. Two of the three batch sizes are enough; null: left out."""

    train_batch_size: Positive | None = key("Samples in an optimizer step, over all ranks.")
    train_micro_batch_size_per_gpu: Positive | None = key(
        "Samples in a micro-batch on one data rank."
    )
    gradient_accumulation_steps: Positive | None = key("Micro-batches in a step on one data rank.")
    gradient_clipping: Rate = Field(
        1.0, description="Largest global norm of the gradients; 0: no clipping."
    )
    optimizer: Optimizer | None = key("The optimizer; required for training.")
    scheduler: Scheduler | None = key("The learning rate schedule; left out: constant.")
    zero_optimization: ZeroOptimization | None = key("ZeRO; left out: stage 0.")
    bf16: Bf16 | None = key("bf16; left out: fp32.")
    fp16: Fp16 | None = key("fp16; left out: fp32.")
    data_types: DataTypes | None = key("Data type in which gradients are summed: fp32.")
    communication_data_type: Literal["fp32", "bf16"] | None = key(
        "Data type in which gradients are communicated; bf16 only with bf16.enabled. Left out: fp32."
    )
    steps_per_print: Positive = Field(
        1_000_000_000,
        description="Steps between two lines of DeepSpeed's log; megalite prints its own progress.",
    )
    wall_clock_breakdown: bool | None = key(
        "DeepSpeed logs the time of forward, backward and step."
    )
    memory_breakdown: bool | None = key("DeepSpeed logs memory usage.")
    dump_state: bool | None = key("DeepSpeed logs its whole state after starting.")
    disable_python_gc: bool | None = key("Turn off Python's garbage collector during training.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = key(
        "Level of DeepSpeed's log."
    )
    comms_logger: CommsLogger | None = key("DeepSpeed's record of collectives.")
    timers: Timers | None = key("DeepSpeed's timers.")
    aio: Aio | None = key("How files are read and written with offload_optimizer.device nvme.")
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
        "autotuning": "not available: it starts other runs; use tools/plan.py",
        "hybrid_engine": "not available: it generates during training; use launcher/generate.py",
        "weight_quantization": "not available: training only",
        "compile": "DeepCompile is not available",
        "managed_gradient_accumulation": "megalite needs DeepSpeed's default, true; leave it out",
        "zero_allow_untested_optimizer": "every optimizer.type is one that DeepSpeed has tested; leave it out",
        "zero_force_ds_cpu_optimizer": "the optimizer is built from optimizer.type; leave it out",
        "disable_allgather": "has no effect in DeepSpeed; use zero_optimization.allgather_partitions",
        "allgather_size": "DeepSpeed's old name; use zero_optimization.allgather_bucket_size",
        "vocabulary_size": "the model's config has it; see megalite.model",
    }
    neutral: ClassVar = {
        "gradient_predivide_factor": (1,),
        "sequence_parallel_size": (1,),
        "managed_gradient_accumulation": (True,),
    }
