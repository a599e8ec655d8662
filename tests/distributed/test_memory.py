"""Memory and traffic of a layout: gradient bytes by storage under ZeRO, bytes sent by axis; and that model states are
predicted byte for byte."""

from typing import Any

import deepspeed
import pytest
import torch

from megalite.config import Config
from megalite.engine.build import build_engine, build_pipeline
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from megalite.parallel.traffic import Traffic
from megalite.plan.states import States, memory_lines, parameter_sizes, predicted_states
from tests.ranks import run_ranks
from tests.small_models import MODELS, SEQUENCE, VOCABULARY, Layout, Task, build

FP32_BYTES = 4
TASK = Task("llama", tied=False)
MICRO_BATCHES = 4


def one_step(rank: int, world_size: int, layout: Layout) -> dict[str, Any]:
    """Most gradient bytes after a backward, bytes sent by axis in a step, this rank's weights and the largest one."""
    engine, pipeline, grid = build(layout, TASK)
    tokens, labels = TASK.samples(0)
    batches = [(tokens[: layout.micro], labels[: layout.micro])] * MICRO_BATCHES
    with Traffic(grid) as traffic, engine.weighed() as weighed:
        pipeline.train_step(batches, 1.0)
    sizes = [value.numel() for value, _ in placed(engine.stage)]
    return {
        "held": weighed["gradients_bytes"],
        "sent": traffic.bytes,
        "weights": sum(sizes),
        "largest": max(sizes),
    }


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, Any]]]:
    return {stage: run_ranks(4, one_step, Layout(pipe=2, data=2, stage=stage)) for stage in (1, 2)}


def test_zero_2_holds_half_of_the_gradients_through_the_pipe(
    measured: dict[int, list[dict[str, Any]]],
) -> None:
    """Between micro-batches: 1/d in fp32. A tensor that straddles two owners is kept whole by its view."""
    for row in measured[2]:
        half = FP32_BYTES * row["weights"] / 2
        assert row["held"] <= half + 2 * FP32_BYTES * row["largest"]
    for row in measured[1]:
        assert row["held"] >= FP32_BYTES * row["weights"]  # what ZeRO-2 saves


def test_zero_1_sends_half_of_an_all_reduce(measured: dict[int, list[dict[str, Any]]]) -> None:
    """formulas.md's counts: ZeRO-1 e_g + e_p at the boundary, ZeRO-2 m·e_g + e_p, in units of (d-1)/d·weights; the
    pipe carries a micro-batch's hidden states (or their gradients) across its one boundary."""
    for stage, reductions in ((1, 1), (2, MICRO_BATCHES)):
        for row in measured[stage]:
            assert row["sent"]["data"] == (reductions + 1) * FP32_BYTES * row["weights"] // 2
            assert row["sent"]["pipe"] == MICRO_BATCHES * 2 * SEQUENCE * 32 * FP32_BYTES


def config_of(
    model: str, pipe: int, tensor: int, stage: int, precision: str, count: int, **zero: Any
) -> dict[str, Any]:
    """A resolved config of 4 ranks; count: micro-batches."""
    scale = (
        {"enabled": True, "initial_scale_power": 4} if precision == "fp16" else {"enabled": True}
    )
    data: dict[str, Any] = {"sequence_length": SEQUENCE, "train": ["unused"]}
    if model == "t5":
        data |= {"samples": "padded", "loss": "marked", "reset_attention": True}
        data["objective"] = {"source_length": 7}
    document = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": count,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, **zero},
        **({} if precision == "fp32" else {precision: scale}),
        "megalite": {
            "model": {**MODELS[model], "tie_word_embeddings": model in ("gpt2", "t5")},
            "parallel": {"pipe": pipe, "tensor": tensor},
            "data": data,
            "train": {"steps": 10, "run_dir": "unused"},
        },
    }
    return Config.from_dict(document).resolve(4).to_json()


def with_experts(config: dict[str, Any], expert: int) -> dict[str, Any]:
    """A resolved config with an expert axis."""
    config["megalite"]["parallel"]["expert"] = expert
    return Config.from_dict(config).resolve(4).to_json()


def with_schedule(config: dict[str, Any], schedule: str) -> dict[str, Any]:
    """A resolved config with another pipeline schedule."""
    config["megalite"]["parallel"]["schedule"] = schedule
    return Config.from_dict(config).resolve(4).to_json()


HELD = [
    with_schedule(config_of("gpt2", 4, 1, 2, "fp32", 4), "zb-h1"),
    with_schedule(config_of("llama", 2, 1, 2, "fp32", 2), "zb-v"),
    with_schedule(config_of("gpt2", 2, 1, 2, "bf16", 2), "zb-v"),
    with_experts(config_of("mixtral", 1, 1, 0, "fp32", 2), 2),
    with_experts(config_of("mixtral", 1, 1, 1, "fp32", 2), 4),
    with_experts(config_of("qwen3_moe", 1, 1, 2, "bf16", 2), 2),
    with_experts(config_of("qwen3_moe", 1, 2, 1, "bf16", 1), 2),
    with_experts(config_of("mixtral", 2, 1, 2, "fp32", 2), 2),
    with_experts(config_of("qwen2_moe", 1, 2, 2, "bf16", 2), 2),
    config_of("mixtral", 1, 1, 3, "fp32", 1),
    config_of("llama", 1, 1, 0, "fp32", 2),
    config_of("gpt2", 1, 2, 0, "fp32", 1),
    config_of("llama", 1, 1, 1, "fp32", 1),
    config_of("gpt2", 2, 1, 1, "fp32", 4),
    config_of("gpt2", 2, 1, 1, "bf16", 4),
    config_of("llama", 2, 2, 1, "bf16", 2),
    config_of("llama", 1, 2, 1, "fp16", 1),
    config_of("llama", 1, 1, 2, "fp32", 2),
    config_of("gpt2", 2, 1, 2, "bf16", 2),
    config_of("llama", 1, 2, 2, "fp16", 2),
    config_of("gpt2", 1, 1, 2, "bf16", 2, offload_optimizer={"device": "cpu"}),
    config_of("gpt2", 2, 1, 2, "fp32", 2, offload_optimizer={"device": "cpu"}),
    config_of("llama", 2, 1, 1, "fp32", 1)
    | {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
    config_of("t5", 2, 1, 2, "fp32", 2),
    config_of("t5", 4, 1, 1, "bf16", 4),
    config_of("t5", 2, 2, 0, "fp32", 2),
    config_of("t5", 1, 2, 3, "bf16", 1, stage3_param_persistence_threshold=1024),
    config_of("llama", 1, 1, 3, "fp32", 2),
    config_of("llama", 1, 2, 3, "bf16", 2, stage3_param_persistence_threshold=1024),
    config_of("gpt2", 1, 1, 3, "fp16", 1, stage3_param_persistence_threshold=0),
    config_of(
        "llama",
        1,
        1,
        3,
        "bf16",
        1,
        offload_optimizer={"device": "cpu"},
        offload_param={"device": "cpu"},
    ),
]


def held_in_a_step(
    rank: int, world_size: int, configs: list[dict[str, Any]]
) -> list[tuple[States, States]]:
    """For each config the bytes predicted for this rank, and the bytes that it held."""
    deepspeed.init_distributed("gloo")
    result = []
    for config in map(Config.from_dict, configs):
        spec = read_spec(config.model)
        parallel = config.parallel
        grid = Grid.build(parallel.pipe, parallel.tensor, expert=parallel.expert)
        engine = build_engine(config, spec, grid)
        pipeline = build_pipeline(engine, config, spec)
        tokens = torch.randint(0, VOCABULARY, (config.micro_batch_size, SEQUENCE))
        batch = tokens, tokens, Context(source=config.data.source_length)
        with engine.weighed() as held:
            pipeline.train_step([batch] * config.accumulation_steps, 1.0)
        place = Grid.at(
            rank, grid.pipe.size, grid.data.size, grid.tensor.size, expert=grid.expert.size
        )
        told = predicted_states(config, parameter_sizes(config, spec, place), place)
        now = States(
            held["weights_bytes"], held["gradients_bytes"], held["optimizer_bytes"], told.buckets
        )
        result.append((told, now))
    return result


def test_states_are_told_to_the_byte() -> None:
    for rank, cases in enumerate(run_ranks(4, held_in_a_step, HELD)):
        for config, (told, held) in zip(HELD, cases, strict=True):
            assert told == held, (rank, config["zero_optimization"], config["megalite"]["parallel"])


def test_zero_3_on_one_rank_holds_small_weights_once() -> None:
    document = config_of("llama", 1, 1, 3, "bf16", 1) | {"train_batch_size": 2}
    [[(told, held)]] = run_ranks(
        1, held_in_a_step, [Config.from_dict(document).resolve(1).to_json()]
    )
    assert told == held


def test_ranks_that_hold_the_same_share_a_line() -> None:
    config = Config.from_dict(config_of("llama", 2, 1, 1, "bf16", 4))
    head, *lines = memory_lines(config, read_spec(config.model))
    assert head.split()[-5:] == ["weights", "gradients", "optimizer", "activations", "bucket"]
    assert [line.split()[0] for line in lines] == ["0-1", "2-3"]


def test_places_on_a_grid_that_is_not_there() -> None:
    for there, place in zip(
        run_ranks(4, places, 1, 4), (Grid.at(rank, 1, 1, 4) for rank in range(4)), strict=True
    ):
        here = [
            (axis.size, axis.rank)
            for axis in (place.pipe, place.data, place.tensor, place.tensor.run(2))
        ]
        assert here == there
    assert [
        (g.pipe.rank, g.data.rank, g.tensor.rank) for g in (Grid.at(r, 2, 2, 2) for r in (1, 5, 6))
    ] == [
        (0, 0, 1),
        (1, 0, 1),
        (1, 1, 0),
    ]  # as in rank_table.py's picture


def places(rank: int, world_size: int, pipe: int, tensor: int) -> list[tuple[int, int]]:
    grid = Grid.build(pipe, tensor)
    return [
        (axis.size, axis.rank) for axis in (grid.pipe, grid.data, grid.tensor, grid.tensor.run(2))
    ]
