"""The rules of the config, each checked by its error line."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from megalite.config import Config, check_model, load_config
from megalite.config.deepspeed_keys import Bf16, DeepSpeedKeys, Fp16
from megalite.config.section import Section, sections_of
from megalite.config.zero_keys import OffloadOptimizer, OffloadParam, ZeroOptimization
from megalite.errors import ConfigError
from megalite.model.families import read_spec

TINY = "ds_configs/tiny_cpu.json"


def test_resolved_config_is_its_own_input() -> None:
    config = load_config(TINY).resolve(8)
    assert Config.from_dict(config.to_json()) == config == config.resolve(8)
    assert (config.train_batch_size, config.data_size, config.world_size) == (16, 2, 8)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "zero_optimizaton.stage=1",
            "zero_optimizaton: unknown key; did you mean zero_optimization?",
        ),
        ('megalite.parallel.tensor="4"', 'megalite.parallel.tensor: "4": must be an integer'),
        ("zero_optimization.stage=3", "must be at most 2 with megalite.parallel.pipe 2"),
        ("megalite.parallel.tensor=3", "world size: 8: must be a multiple of"),
        (
            "megalite.parallel.schedule=zbv",
            "megalite.parallel.schedule: \"zbv\": must be '1f1b', 'interleaved'",
        ),
        ("megalite.parallel.chunks=2", 'chunks: 2: needs megalite.parallel.schedule "interleaved"'),
        ("megalite.parallel.chunks=1", "megalite.parallel.chunks: 1: must be at least 2"),
        (
            "megalite.parallel.cut=[4]",
            "cut: [4]: must have 2 numbers: megalite.parallel.pipe 2 × 1 chunks per rank",
        ),
        (
            "megalite.parallel.cut=[0,4]",
            "cut: [0, 4]: must have at least 1 layer in every chunk but the last",
        ),
        ("train_batch_size=9", "= 16"),
        ("fp16.auto_cast=true", "fp16.auto_cast: a stage's inputs are token ids"),
        ("bf16.check_grad_overflow=true", "see megalite.train.faults.not_finite"),
        ("megalite.train.faults.spike=skip", "needs megalite.train.faults.spike_factor"),
        (
            "zero_optimization.offload_optimizer.device=nvme",
            "needs zero_optimization.stage 3 or more",
        ),
        (
            "zero_optimization.offload_param.device=nvme",
            'device: "nvme": must be none or cpu: parameters in files',
        ),
        (
            "gradient_accumulation_steps=1000000000000",
            "gradient_accumulation_steps: 1000000000000: must be at most 100,000",
        ),
        (
            'megalite.train.run_dir="a\\u0000"',
            'megalite.train.run_dir: "a\\u0000": must not contain a null character',
        ),
        ("bf16=3", "bf16: 3: must be an object"),
        ("megalite.model=3", "megalite.model: 3: must be"),
        ('tensorboard={"enabled":true}', "use megalite.train.tensorboard"),
        (
            "megalite.data.sequence_length=1000000000",
            "megalite.data.sequence_length: 1000000000: must be at most",
        ),
        (
            "megalite.train.steps=9223372036854775808",
            "9223372036854775808: must be a 64-bit integer",
        ),
        ("megalite.train.z_loss=1e999", "megalite.train.z_loss: inf: must be a finite number"),
        (f"megalite.train.steps={'9' * 5000}", "4300 digits"),
        (f"megalite.model={'[' * 100_000}", "nested too deeply"),
        ('megalite.train.run_dir="\\ud800"', "half of a surrogate pair"),
        ("megalite.train.run_dir=\udcff", "the value is not UTF-8"),
    ],
)
def test_a_mistake_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(TINY, [override]).resolve(8)
    assert line in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["pipe=1", "schedule=zb-v"],
            'schedule: "zb-v": needs megalite.parallel.pipe of 2 or more',
        ),
        (
            ["schedule=zb-v", "chunks=3"],
            'chunks: 3: must be 2 with megalite.parallel.schedule "zb-v"',
        ),
        (
            ["schedule=interleaved", "pipe=8", "tensor=1"],
            "train_batch_size: 8: must be a multiple of train_micro",
        ),
        (["pipe=8", "tensor=1"], "pipe: 8: must be at most num_hidden_layers + 1 (the head) = 5"),
        (
            ["schedule=interleaved", "chunks=3"],
            "pipe: 2: times 3 chunks per rank = 6: must be at most num_hidden_layers",
        ),
        (["cut=[2,3]"], "cut: [2, 3]: sums to 5: must sum to num_hidden_layers 4"),
    ],
)
def test_the_pipe_axis_fits_schedule_batch_and_layers(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config = load_config(
            TINY, [f"megalite.parallel.{override}" for override in overrides]
        ).resolve(8)
        check_model(config, read_spec(config.model))
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_interleaving_holds_for_every_batch_of_a_ramp() -> None:
    ramp = 'megalite.train.batch_ramp={"start": 4, "increment": 4, "samples": 100}'
    with pytest.raises(
        ConfigError, match=r"batch_ramp.start: 4: must be a multiple of .* = 8 with"
    ):
        load_config(TINY, [ramp, "megalite.parallel.schedule=interleaved"]).resolve(8)


def test_a_resolved_config_contains_defaults_that_differ_from_deepspeeds() -> None:
    """Each bucket is sent only to its owner, half of the bytes of DeepSpeed's default; torch's fused Adam is used, also
    with offloading."""
    for offload in ("none", "cpu"):
        keys = [
            "zero_optimization.stage=2",
            f"zero_optimization.offload_optimizer.device={offload}",
        ]
        keys += ["megalite.parallel.pipe=1"]
        resolved = load_config(TINY, keys).resolve(8).to_json()
        assert resolved["zero_optimization"]["use_multi_rank_bucket_allreduce"] is False
        params = resolved["optimizer"]["params"]
        assert params["torch_adam"] is True and params["fused"] is True
    own = (
        load_config(TINY, ["optimizer.params.torch_adam=false"])
        .resolve(8)
        .to_json()["optimizer"]["params"]
    )
    assert "fused" not in own  # DeepSpeed's Adam does not know the key


def test_16_bits_need_a_stage_and_one_type() -> None:
    for keys, line in (
        (["fp16.enabled=true", "bf16.enabled=true"], "must not be on together with bf16.enabled"),
        (
            ["fp16.enabled=true", "zero_optimization.stage=0", "megalite.parallel.pipe=1"],
            "ZeRO stage 0 with fp16",
        ),
        (
            [
                "train_batch_size=4000000",
                "gradient_accumulation_steps=null",
                'megalite.train.batch_ramp={"start": 4, "increment": 4, "samples": 9000000}',
            ],
            "gives 999,999 increments: must",
        ),
        (
            ["megalite.train.faults.not_finite=rewind", "megalite.data.order=megatron"],
            "must not be rewind with",
        ),
    ):
        with pytest.raises(ConfigError, match=line):
            load_config(TINY, keys).resolve(8)
    fp16 = load_config(TINY, ["fp16.enabled=true"]).resolve(8).to_json()["fp16"]
    assert (fp16["loss_scale"], fp16["initial_scale_power"], fp16["hysteresis"]) == (0.0, 16, 2)


def test_every_key_of_deepspeeds_sections_is_accepted_or_refused() -> None:
    sections = {
        ZeroOptimization: DeepSpeedZeroConfig,
        OffloadOptimizer: DeepSpeedZeroOffloadOptimizerConfig,
        OffloadParam: DeepSpeedZeroOffloadParamConfig,
        Bf16: DeepSpeedBF16Config,
        Fp16: DeepSpeedFP16Config,
    }
    for ours, theirs in sections.items():
        keys = {field.alias or name for name, field in theirs.model_fields.items()}
        assert keys <= ours.model_fields.keys() | ours.refused.keys(), ours
        assert keys >= ours.model_fields.keys(), ours


def test_every_accepted_key_of_deepspeeds_is_tested_somewhere() -> None:
    """In a test that trains or in an example; tests with forged values do not count."""
    tests = [
        path
        for path in Path("tests").rglob("*.py")
        if "forged" not in path.name and "foreign" not in path.name
    ]
    text = "\n".join(path.read_text() for path in [*tests, *Path("ds_configs").glob("*.json")])
    words = set(re.findall(r"\w+", text))

    def keys(section: type[Section]) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield name
            for inner in sections_of(field.annotation):
                yield from keys(inner)

    assert not [key for key in keys(DeepSpeedKeys) if key not in words]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["context=3"], "× megalite.parallel.tensor 2 × megalite.parallel.context 3 = 12"),
        (["context=0"], "megalite.parallel.context: 0: must be at least 1"),
        (
            ["context_attention=heads"],
            'context_attention: "heads": needs megalite.parallel.context of 2 or more',
        ),
        (
            ["context=8", "pipe=1", "tensor=1"],
            "sequence_length: 132: must be a multiple of 2 × megalite.parallel.context 8 = 16",
        ),
        (
            ["context=2", "sequence=true"],
            "a multiple of 2 × megalite.parallel.context 2 × megalite.parallel.tensor 2 = 8",
        ),
        (
            ["context=2", "tensor=4", "pipe=1", "context_attention=heads"],
            "context: 2: must divide num_attention_heads 4 / tensor 4 = 1 with",
        ),
    ],
)
def test_the_context_axis_fits_world_samples_and_heads(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        keys = [f"megalite.parallel.{override}" for override in overrides]
        config = load_config(TINY, [*keys, "megalite.data.sequence_length=132"]).resolve(8)
        check_model(config, read_spec(config.model))
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_samples_are_divided_only_over_the_data_axis() -> None:
    config = load_config(TINY, ["megalite.parallel.context=2"]).resolve(16)
    assert (config.data_size, config.world_size, config.train_batch_size) == (2, 16, 16)
    assert Config.from_dict(config.to_json()) == config
