"""JSONs written for other trainers: features that are off are accepted, values of `auto` are printed, and errors are
reported together."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config, load_config
from megalite.errors import ConfigError
from tests.programs import run_program
from tests.ranks import REPOSITORY
from tests.unit.data.corpora import write_corpus

OURS: dict[str, Any] = json.loads((REPOSITORY / "ds_configs/tiny_cpu.json").read_text())["megalite"]
ALONE: dict[str, Any] = {**OURS, "parallel": {}}
# From the page "DeepSpeed" of the transformers documentation: ZeRO-2 and ZeRO-3.
TRAINERS: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
                   "total_num_steps": "auto"},
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
ZERO2 = {
    "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True,
    "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": "auto",
    "contiguous_gradients": True,
}  # fmt: skip
ZERO3 = {
    "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
    "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip


@pytest.mark.parametrize("zero", [ZERO2, ZERO3])
def test_the_trainers_configs_are_accepted_and_values_of_auto_are_printed(
    zero: dict[str, Any],
) -> None:
    config = Config.from_dict({**TRAINERS, "zero_optimization": zero, "megalite": ALONE}).resolve(2)
    assert Config.from_dict(config.to_json()) == config and "auto" not in json.dumps(
        config.deepspeed
    )
    assert (config.micro_batch_size, config.accumulation_steps, config.gradient_clipping) == (
        8,
        1,
        1.0,
    )
    optimizer, scheduler = config.document.optimizer, config.document.scheduler
    assert optimizer is not None and scheduler is not None and config.precision == "fp32"
    assert (optimizer.params.lr, optimizer.params.betas, optimizer.params.weight_decay) == (
        5e-5,
        [0.9, 0.999],
        0.0,
    )
    assert config.deepspeed["scheduler"]["params"]["total_num_steps"] == config.train.steps
    assert {
        "optimizer.params.lr: auto becomes 5e-05",
        "gradient_clipping: auto becomes 1.0",
        "bf16.enabled: auto becomes false",
        "train_micro_batch_size_per_gpu: auto is left out: it follows from the other two batch sizes",
    } <= set(config.notes)
    assert any(
        line.startswith("zero_optimization.reduce_bucket_size: auto is left out")
        for line in config.notes
    )
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save: true has no effect"
    assert any(line.startswith(gathers) for line in config.notes) == (zero is ZERO3)


def test_check_prints_the_values_of_auto(tmp_path: Path) -> None:
    write_corpus(tmp_path / "x", 60, vocabulary=2048)
    data = {"sequence_length": 16, "train": [str(tmp_path / "x")]}
    keys = {**TRAINERS, "zero_optimization": ZERO2, "megalite": {**ALONE, "data": data}}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    words = ["--deepspeed_config", str(tmp_path / "config.json"), "--check"]
    done = run_program("launcher/pretrain.py", *words)
    assert done.returncode == 0 and json.loads(done.stdout)["optimizer"]["params"]["lr"] == 5e-5, (
        done.stderr
    )
    assert "optimizer.params.lr: auto becomes 5e-05\n" in done.stderr


OFF = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "sparse_gradients": False,
    "amp": {"enabled": False},
    "tensorboard": {"enabled": False, "output_path": "x"},
    "wandb": {"enabled": False},
    "flops_profiler": {"enabled": False, "profile_step": 1, "detailed": True},
    "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    "activation_checkpointing": {
        "partition_activations": False,
        "number_checkpoints": None,
        "profile": False,
    },
    "data_efficiency": {"enabled": False},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}},
    "zero_allow_untested_optimizer": True,
    "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1,
}


def test_features_that_are_off_are_accepted() -> None:
    none = 'zero_optimization.offload_optimizer={"device":"none"}'
    plain = load_config("ds_configs/tiny_cpu.json", [none]).resolve(8)
    keys = json.loads((REPOSITORY / "ds_configs/tiny_cpu.json").read_text()) | OFF
    keys["zero_optimization"] |= {
        "stage3_module_granularity_threshold": 0, "zero_hpz_partition_size": 1, "cpu_offload": False, "zenflow": None,
        "offload_optimizer": {"device": "none", "ratio": 1.0},
    }  # fmt: skip
    keys |= {"bf16": {"enabled": False, "immediate_grad_update": False}}
    config = Config.from_dict(keys).resolve(8)
    assert config.deepspeed | {"bf16": None} == plain.deepspeed | {"bf16": None}
    for name in OFF:
        assert name not in config.to_json()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("prescale_gradients=true", "prescale_gradients: megalite scales gradients itself"),
        ("gradient_predivide_factor=2.0", "gradient_predivide_factor: megalite scales"),
        ('flops_profiler={"enabled":true}', "flops_profiler: metrics go to metrics.jsonl"),
        (
            'activation_checkpointing={"partition_activations":true}',
            "use megalite.train.activation_checkpointing",
        ),
        (
            "optimizer.params.bias_correction=false",
            "optimizer.params.bias_correction: it is always on",
        ),
        ("zero_optimization.compute_grad_norm=false", "the norm is always computed"),
        (
            'zero_optimization={"stage":3,"offload_optimizer":{"device":"cpu","ratio":0.5}}',
            "zero_optimization.offload_optimizer.ratio: must be 1 or left out: DeepSpeed updates the part that is not",
        ),
        (
            "zero_optimization.stage3_module_granularity_threshold=10",
            "stage3_module_granularity_threshold: ",
        ),
        ("bf16.immediate_grad_update=true", "bf16.immediate_grad_update: "),
        ("megalite.train.steps=auto", 'megalite.train.steps: "auto": must be an integer'),
        ("optimizer.params.momentum=auto", 'optimizer.params.momentum: "auto": must be a number'),
        (
            "train_batch_size=auto train_micro_batch_size_per_gpu=auto",
            "train_batch_size: missing: give it or",
        ),
        ("log_level=loud", 'log_level: "loud": must be'),
    ],
)
def test_unsupported_or_meaningless_values_are_refused(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("ds_configs/tiny_cpu.json", override.split()).resolve(8)
    assert line in str(raised.value)


def test_all_errors_are_reported_together() -> None:
    overrides = [
        "train_batch_sise=3", "zero_optimization.stage=7", "zero_optimization.cpu_offload=true", "wandb.enabled=true",
        "optimizer.params.lr=-1", "scheduler.params.warmup_stepz=3", "megalite.data.sequence_length=x",
        'megalite.data.train=[3, {"path": "a", "wait": 1}]', "megalite.train.seed=1.5", "megalite.parallel.pip=2",
        'megalite.train.parameter_groups=[{"match": "*"}, {"lr_ratio": 2}]', 'megalite.data.objective={"mask": 0.1}',
    ]  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        load_config("ds_configs/tiny_cpu.json", overrides)
    lines = raised.value.lines
    assert str(raised.value) == lines[0] and not any("\n" in line for line in lines)
    starts = [
        "optimizer.params.lr: -1: must be greater than 0",
        "scheduler.params.warmup_stepz: unknown key; did you mean scheduler.params.warmup_steps?",
        "zero_optimization.stage: 7: must be at most 3",
        "zero_optimization.cpu_offload: deprecated in DeepSpeed",
        "megalite.parallel.pip: unknown key; did you mean megalite.parallel.pipe?",
        'megalite.data.sequence_length: "x": must be an integer',
        "megalite.data.train.0: 3: must be a prefix or",
        "megalite.data.train.1.wait: unknown key; did you mean megalite.data.train.1.weight",
        "megalite.data.objective.mask: unknown key; did you mean megalite.data.objective.masked?",
        "megalite.data.objective.masked: missing",
        "megalite.train.seed: 1.5: must be an integer",
        "megalite.train.parameter_groups.1.match: missing",
        "train_batch_sise: unknown key; did you mean train_batch_size?",
        "wandb: metrics go to metrics.jsonl",
    ]
    assert sorted(lines) == sorted(lines, key=str) and len(lines) == len(starts), lines
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start), (line, start)


def test_errors_between_keys_are_reported_together() -> None:
    overrides = [
        "bf16.enabled=true", "fp16.enabled=true", "zero_optimization.stage=3", "optimizer.params.momentum=0.5",
        "megalite.data.eod_mask_loss=true", "megalite.data.tokenizer=null", "megalite.train.faults.spike=skip",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        load_config("ds_configs/tiny_cpu.json", overrides).resolve(8)
    keys = [line.partition(":")[0] for line in raised.value.lines]
    assert keys == [
        "megalite.data.eod_mask_loss", "megalite.train.faults.spike", "fp16.enabled", "zero_optimization.stage",
        "optimizer.params.momentum",
    ]  # fmt: skip


def test_the_program_prints_a_line_for_each(tmp_path: Path) -> None:
    words = ["--deepspeed_config", "ds_configs/tiny_cpu.json", "--check"]
    words += ["zero_optimization.stage=7", "megalite.train.seed=1.5"]
    done = run_program("launcher/pretrain.py", *words)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert all(line.startswith("pretrain.py: ") for line in lines)
