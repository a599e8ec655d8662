"""The rules of the configuration, each by the line that a user reads."""

import pytest

from megalite.config import Config, load_config
from megalite.errors import ConfigError

TINY = "ds_configs/tiny_cpu.json"


def test_resolved_config_is_its_own_input() -> None:
    config = load_config(TINY).resolve(8)
    assert Config.from_dict(config.to_json()) == config == config.resolve(8)
    assert (config.train_batch_size, config.data_size, config.world_size) == (16, 2, 8)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("zero_optimizaton.stage=1", "zero_optimizaton: unknown key; did you mean zero_optimization?"),
        ('megalite.parallel.tensor="4"', 'megalite.parallel.tensor: "4": must be an integer'),
        ("zero_optimization.stage=3", "must be 1 or 2 with megalite.parallel.pipe 2"),
        ("megalite.parallel.tensor=3", "world size: 8: must be a multiple of"),
        ("train_batch_size=9", "= 16"),
        ("fp16.enabled=true", "not available yet: use bf16"),
        ("bf16=3", "bf16: 3: must be an object"),
        ("megalite.model=3", "megalite.model: 3: must be"),
        ("tensorboard={}", "use megalite.train.tensorboard"),
    ],
)
def test_a_mistake_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(TINY, [override]).resolve(8)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_a_resolved_config_says_what_deepspeed_would_choose_otherwise() -> None:
    """Buckets go to their owners alone (half of the bytes of DeepSpeed's default), and without a GPU torch's Adam
    steps, with offloading too."""
    for offload in ("none", "cpu"):
        keys = ["zero_optimization.stage=2", f"zero_optimization.offload_optimizer.device={offload}"]
        keys += ["megalite.parallel.pipe=1"]
        resolved = load_config(TINY, keys).resolve(8, has_gpu=False).to_json()
        assert resolved["zero_optimization"]["use_multi_rank_bucket_allreduce"] is False
        assert resolved["optimizer"]["params"]["torch_adam"] is True
    assert "torch_adam" not in load_config(TINY).resolve(8, has_gpu=True).to_json()["optimizer"]["params"]
