"""The rules of experts and their axis, each checked by its error line."""

from typing import Any

import pytest

from megalite.config import Config, check_model
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from tests.small_models import MODELS


def config(**changes: Any) -> Config:
    parallel = changes.pop("parallel", {})
    train = {"steps": 1, "run_dir": "unused", **changes.pop("train", {})}
    return Config.from_dict(
        {
            "train_batch_size": changes.pop("train_batch_size", 8),
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 1, **changes.pop("zero", {})},
            "megalite": {
                "model": MODELS[changes.pop("model", "mixtral")],
                "parallel": parallel,
                "data": {"sequence_length": 12, "train": ["unused"]},
                "train": train,
            },
        }
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"parallel": {"expert": 3}}, "megalite.parallel.expert: 3: must divide the data axis of 8 ranks"),
        ({"parallel": {"expert": 4, "tensor": 4}}, "megalite.parallel.expert: 4: must divide the data axis of 2 ranks"),
        ({"parallel": {"expert": 2}, "model": "llama"},
         "megalite.parallel.expert: 2: must be 1: a llama model of this config has no experts"),
        ({"train": {"router": {"bias_rate": 0.1}}},
         'megalite.train.router.bias_rate: 0.1: needs megalite.train.router.balance "bias"'),
        ({"train": {"router": {"z_loss": 0.1}}, "model": "llama"},
         'megalite.train.router: {"z_loss": 0.1}: must be left out: a llama model of this config has no experts'),
        ({"parallel": {"expert": 2}, "zero": {"stage": 3}},
         "zero_optimization.stage: 3: must be at most 2 with megalite.parallel.expert 2"),
        ({"parallel": {"expert": 2}, "zero": {"reduce_scatter": False}},
         "zero_optimization.reduce_scatter: false: must be true with megalite.parallel.expert 2"),
        ({"parallel": {"expert": 2}, "zero": {"offload_optimizer": {"device": "cpu"}}},
         'zero_optimization.offload_optimizer.device: "cpu": must be none with megalite.parallel.expert 2'),
    ],
)  # fmt: skip
def test_a_mistake_about_experts_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        made = config(**changes).resolve(8)
        check_model(made, read_spec(made.model))
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_the_tensor_axis_divides_the_shared_expert() -> None:
    made = config(parallel={"tensor": 4}, model="qwen2_moe").resolve(4)
    section = {**MODELS["qwen2_moe"], "shared_expert_intermediate_size": 30}
    rule = "megalite.parallel.tensor: 4: must divide shared_expert_intermediate_size 30"
    with pytest.raises(ConfigError, match=rule):
        check_model(made, read_spec(section))


def test_the_expert_axis_divides_the_experts() -> None:
    made = config(parallel={"expert": 16}, train_batch_size=16)
    made = made.resolve(16)
    with pytest.raises(ConfigError, match="expert: 16: must divide the model's 8 experts"):
        check_model(made, read_spec(made.model))
