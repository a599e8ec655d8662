"""A run whose states alone exceed a GPU's memory is refused before ranks start."""

from typing import Any

import pytest

from megalite.config import Config, load_config
from megalite.errors import ConfigError
from megalite.model.families import model_dict, read_spec
from megalite.plan.device_figures import GIB
from megalite.plan.rank_memory import MemoryTable, SizesByPlace, check_states
from megalite.plan.states import parameter_sizes, place_of, predicted_states
from megalite.training import pretraining
from tests.ranks import REPOSITORY


def resolved(name: str, ranks: int, *keys: str) -> Config:
    return load_config(str(REPOSITORY / f"ds_configs/{name}.json"), [*keys]).resolve(ranks)


@pytest.mark.parametrize(
    ("name", "ranks"), [("llama_7b_3d", 64), ("llama_13b_zero3_tensor", 32), ("mixtral_8x7b", 64)]
)
def test_the_states_of_the_rank_that_has_most_are_the_limit(name: str, ranks: int) -> None:
    config = resolved(name, ranks)
    spec = read_spec(config.model)
    pipe, most = config.parallel.pipe, 0
    for last in range(config.world_size // pipe - 1, config.world_size, config.world_size // pipe):
        place = place_of(config, last)
        states = predicted_states(config, parameter_sizes(config, spec, place), place)
        most = max(most, states.weights + states.gradients + states.optimizer)
    check_states(config, spec, most)
    with pytest.raises(ConfigError) as refused:
        check_states(config, spec, most - 1)
    said = f"GiB for weights, gradients and optimizer state: a GPU here has {most / GIB:.1f} "
    assert f"world size: {ranks}: rank " in str(refused.value) and said in str(refused.value)


def test_offloaded_states_are_not_the_gpus() -> None:
    config = resolved("zero2_offload", 2)
    spec = read_spec(config.model)
    (held,) = MemoryTable(config, spec, None, SizesByPlace()).ranks
    check_states(config, spec, held.weights)
    with pytest.raises(ConfigError, match="GiB for weights: a GPU here has"):
        check_states(config, spec, held.weights - 1)

    config = resolved("zero3_offload", 2)  # also the weights
    check_states(config, read_spec(config.model), 0)


def test_a_run_on_gpus_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved("tiny_cpu", 8)
    prepared = pretraining.PreparedRun(config, read_spec(config.model), model_dict(config.model))

    def start(prepare: Any, *args: Any) -> None:
        prepare(True)

    monkeypatch.setattr(pretraining, "prepare", lambda *args: prepared)
    monkeypatch.setattr(pretraining, "start_ranks", start)
    monkeypatch.setattr(pretraining, "gpu_memory_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match="world size: 8: rank .* a GPU here has 0.0"):
        pretraining.main(["--deepspeed_config", "x.json"])
