"""Initial weights compared with those of transformers' models, and the keys that change them."""

import pytest
import torch
from transformers import AutoConfig

from megalite.engine.build import build_stage
from megalite.hub.names import hf_auto_class
from megalite.model.families import read_spec
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from tests.families import FAMILY_CONFIGS, file_reader
from tests.hf_tensors import from_hf
from tests.unit.config.test_schedules import tiny


def spread(value: torch.Tensor) -> float:
    return value.square().mean().sqrt().item()


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_initial_weights_are_spread_as_in_transformers(name: str) -> None:
    torch.manual_seed(0)
    model = hf_auto_class(read_spec(FAMILY_CONFIGS[name])).from_config(
        AutoConfig.for_model(**FAMILY_CONFIGS[name])
    )
    config = tiny()
    spec, read = read_spec(FAMILY_CONFIGS[name]), file_reader(model.state_dict())
    for value, place in placed(build_stage(config, spec, Grid())):
        if place.name == "head.weight" and spec.stacks is not None:
            continue  # which transformers does not draw for any model
        theirs = from_hf(spec, place.name, read)
        # Both are samples: the relative error of a deviation estimated from n elements is 1 / sqrt(2 n).
        wanted, slack = spread(theirs), 5 * (1 / value.numel()) ** 0.5 if place.std else 0
        assert spread(value.detach()) == pytest.approx(wanted, rel=slack), place.name


def test_init_keys_change_what_they_name() -> None:
    def spreads(*keys: str) -> dict[str, float]:
        config = tiny("megalite.parallel.pipe=1", *keys)
        stage = build_stage(config, read_spec(config.model), Grid())
        return {place.name: spread(value.detach()) for value, place in placed(stage)}

    found = spreads("megalite.train.init.std=0.05", "megalite.train.init.depth_scaled=true")
    found |= {
        f"{name} 2": v for name, v in spreads("megalite.train.init.embedding_std=0.3").items()
    }
    for name, std in {
        "embedding.tokens.weight": 0.05,
        "layers.3.attention.output.weight": 0.05 / 8**0.5,
        "layers.3.mlp.down.weight": 0.05 / 8**0.5,
        "layers.3.mlp.up.weight": 0.05,
        "embedding.tokens.weight 2": 0.3,
        "layers.3.attention.output.weight 2": 0.02,
    }.items():
        assert found[name] == pytest.approx(std, rel=0.03), name
