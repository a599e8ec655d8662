"""Which faults are planted in a layout (megalite/prove/mutants.py and `*_mutants.py`); that they are found:
tests/distributed/test_verify.py."""

from typing import Any

import pytest

from megalite.config import Config
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from megalite.prove.mutants import chosen, mutants
from megalite.prove.parameter_mutants import kind_of
from tests.families import FAMILY_CONFIGS
from tests.small_models import MODELS


def config(model: str, world_size: int, **parallel: int) -> Config:
    document: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": (MODELS | FAMILY_CONFIGS)[model],
            "parallel": parallel,
            "data": {"sequence_length": 12, "train": ["data/train"]},
            "train": {"steps": 1, "run_dir": "runs/x"},
        },
    }
    return Config.from_dict(document).resolve(world_size)


def test_every_kind_of_parameter_has_faults_and_every_name_is_one() -> None:
    names = list(mutants(config("llama", 8, pipe=2, tensor=2)))
    assert len(set(names)) == len(names)
    stage = Stage(read_spec(MODELS["llama"]), Grid())
    for kind in {kind_of(place.name) for _, place in placed(stage)}:
        own = [name for name in names if name.startswith(f"{kind}: ")]
        assert len(own) >= 7, kind
        assert (f"{kind}: weight decay dropped" in own) == ("norm" not in kind), kind


@pytest.mark.parametrize(
    ("model", "parallel", "world_size", "has", "lacks"),
    [
        ("llama", {}, 1, "counted twice in the norm", "last data rank is lost"),
        ("llama", {}, 2, "gradient of the last data rank is lost", "tensor rank"),
        ("llama", {"tensor": 2}, 2, "gradient of the last tensor rank is doubled", "data rank"),
        ("llama", {"context": 2}, 2, "gradient of the last context rank is lost", "data rank is"),
        ("llama", {}, 2, "norm", "experts:"),
        ("smollm3", {"pipe": 2}, 2, "have the rotary positions of others", "tensor rank"),
        ("llama", {"pipe": 2}, 2, "norm", "rotary positions"),
        ("mixtral", {"expert": 2}, 2, "experts: gradients are divided by the copies", "shared exp"),
        ("mixtral", {}, 2, "experts: left out of the norm", "divided by the copies"),
        ("qwen2_moe", {"tensor": 2}, 2, "the shared expert's gate gradient is not summed", "copies of an"),
    ],
)  # fmt: skip
def test_faults_are_those_of_existing_axes(
    model: str, parallel: dict[str, int], world_size: int, has: str, lacks: str
) -> None:
    names = list(mutants(config(model, world_size, **parallel)))
    assert any(has in name for name in names) and not any(lacks in name for name in names)


def test_a_selection_has_one_fault_of_each_function_and_then_others() -> None:
    def one(*given: Any) -> None: ...

    def other(*given: Any) -> None: ...

    plants = {name: other if name == "e" else one for name in "abcdefghij"}
    assert chosen(plants, 1) == ["a"] and chosen(plants, 2) == ["a", "e"]
    assert chosen(plants, 5) == ["a", "e", "b", "d", "h"]
    assert sorted(chosen(plants, 20)) == [*"abcdefghij"] and chosen(plants, 0) == []


def test_a_kind_is_a_name_without_its_layer() -> None:
    assert kind_of("layers.13.mlp.up.weight") == "layers.*.mlp.up.weight"
    assert kind_of("head.weight") == "head.weight"
