"""The description of a run (megalite/training/about.py)."""

import json
from typing import Any

from megalite.config import Config
from megalite.config.section import parse
from megalite.config.sections import Train
from megalite.model.families import read_spec
from megalite.pipeline.pipeline_plan import plan_of
from megalite.plan.states import parameter_sizes, place_of, predicted_states
from megalite.training.about import SHOWN_ROUNDS, about, axes_of, differing
from tests.classifiers import CONFIGS
from tests.small_models import MODELS


def config(world_size: int, parallel: dict[str, Any], batch: int = 64, **keys: Any) -> Config:
    document = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": MODELS["llama"],
            "parallel": parallel,
            "data": {"sequence_length": 16, "train": ["data/train"]},
            "train": {"steps": 9, "run_dir": "runs/x"},
        },
        **keys,
    }
    return Config.from_dict(document).resolve(world_size)


def test_it_is_json_with_the_whole_grid() -> None:
    made = config(8, {"pipe": 2, "tensor": 2})
    spec = read_spec(made.model)
    told = about(made, spec)
    assert json.loads(json.dumps(told)) == told
    assert told["grid"] == axes_of(made) == {"pipe": 2, "data": 2, "tensor": 2}
    assert (told["model"], told["causal"], told["loss_unit"]) == ("llama", True, "nats per token")
    assert told["parameters"] == spec.num_parameters
    assert axes_of(config(4, {"context": 2}))["context"] == 2


def test_each_rank_has_its_own_prediction() -> None:
    made = config(8, {"pipe": 2, "tensor": 2})
    spec = read_spec(made.model)
    told = about(made, spec)["predicted"]
    assert len(told) == 8
    for rank, row in enumerate(told):
        grid = place_of(made, rank)
        states = predicted_states(made, parameter_sizes(made, spec, grid), grid)
        assert row["weights_bytes"] == states.weights, rank
        assert row["optimizer_bytes"] == states.optimizer and row["activations_bytes"] > 0
    assert told[0]["activations_bytes"] != told[4]["activations_bytes"]  # for two stages


def test_a_long_step_is_drawn_in_part_but_its_bubble_is_that_of_all() -> None:
    made = config(2, {"pipe": 2})
    told = about(made, read_spec(made.model))["pipeline"]
    assert told["micro_batches"] == 64 and told["shown_micro_batches"] == SHOWN_ROUNDS * 2
    shorter = plan_of(made, read_spec(made.model)).report(told["shown_micro_batches"]).bubble
    assert 0 < told["bubble"] < shorter
    assert sum(told["layers"]) == 4 and told["chunks"] == 1
    ends = [end for own in told["actions"] for *_, end in own]
    assert len(ends) == 2 * 2 * told["shown_micro_batches"] and max(ends) == 1.0
    assert about(config(2, {}), read_spec(made.model))["pipeline"] == {}


def test_keys_that_differ_from_their_defaults() -> None:
    keys = {"steps": 9, "run_dir": "x", "seed": 7, "limits": {"step_seconds": 60}}
    found = {key: (value, default) for key, value, default in differing(parse(Train, keys, "x"))}
    assert found["steps"][0] == 9 and found["run_dir"] == ("x", None)
    assert found["seed"] == (7, 1234)
    assert found["limits.step_seconds"][0] == 60 and "limits.checkpoint_seconds" not in found


def test_a_classifiers_loss_is_per_text() -> None:
    told = about(config(1, {}, batch=1), read_spec(CONFIGS["llama"]))
    assert told["loss_unit"] == "nats per text"
