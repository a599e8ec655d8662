"""DeepSpeed's keys that change speed, memory or what is logged: on two ranks every loss and norm is that of the run
without them. Those that change the function do what they say."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, rows, spoilt, train

STEPS = 3
CPU = {"offload_optimizer": {"device": "cpu"}}
PINNED = {"device": "cpu", "pin_memory": True}
SMALL = {"reduce_bucket_size": 500}
ZERO: dict[str, tuple[dict[str, int], dict[str, Any], list[dict[str, Any]]]] = {
    # By name: the layout, the keys of both runs, and the additional keys of one.
    "stage 2": ({"zero": 2}, SMALL, [
        {"contiguous_gradients": False, "reduce_scatter": False, "allgather_partitions": False},
        {"overlap_comm": True, "allgather_bucket_size": 500, "ignore_unused_parameters": False,
         "round_robin_gradients": True},
    ]),
    "stage 2, pipe": ({"zero": 2, "pipe": 2}, SMALL, [{"overlap_comm": True, "contiguous_gradients": True}]),
    "stage 2, offload": ({"zero": 2}, CPU, [{"offload_optimizer": PINNED, "round_robin_gradients": True}]),
    "stage 3": ({"zero": 3}, {}, [
        {"overlap_comm": False, "contiguous_gradients": False, "sub_group_size": 500,
         "stage3_prefetch_bucket_size": 500, "stage3_model_persistence_threshold": 100,
         "stage3_max_live_parameters": 500, "stage3_max_reuse_distance": 500},
        {"stage3_use_all_reduce_for_fetch_params": True, "memory_efficient_linear": False,
         "override_module_apply": False, "log_trace_cache_warnings": True, "enable_sanity_checks": True},
        {"stage3_allgather_sequential": True, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
         "stage3_max_reuse_distance": 0, "stage3_model_persistence_threshold": 0},
    ]),
    "stage 3, weights only": ({"zero": 3}, {}, [{"offload_param": PINNED}, {"offload_param": {"device": "cpu"}}]),
    "stage 3, offload": ({"zero": 3}, CPU, [{"offload_optimizer": PINNED, "offload_param": PINNED}]),
}  # fmt: skip
LOGGED: list[dict[str, Any]] = [
    {"wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True, "disable_python_gc": True,
     "log_level": "error"},
    {"comms_logger": {"enabled": True, "prof_all": True, "verbose": True, "debug": True},
     "timers": {"throughput": {"enabled": True, "synchronized": True}}, "steps_per_print": 1},
    {"comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]},
     "timers": {"throughput": {"enabled": False, "synchronized": False}}},
]  # fmt: skip


def test_levers_of_zero_and_what_is_logged_change_no_figure(tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {}
    alike: list[tuple[str, str]] = []

    def of(name: str, layout: dict[str, int], zero: dict[str, Any], top: dict[str, Any]) -> None:
        keys = document(tmp_path, name, layout, train={"steps": STEPS})
        keys["zero_optimization"] |= zero
        runs[name] = keys | top
        asked = Config.from_dict(runs[name]).resolve(2).deepspeed
        assert asked["zero_optimization"].items() >= zero.items() and asked.items() >= top.items()

    for name, (layout, both, ones) in ZERO.items():
        of(name, layout, both, {})
        for number, one in enumerate(ones):
            of(f"{name}, {number}", layout, both | one, {})
            alike.append((name, f"{name}, {number}"))
    for number, top in enumerate(LOGGED):
        of(f"logged {number}", {"zero": 2}, SMALL, top)
        alike.append(("stage 2", f"logged {number}"))
    assert run_ranks(2, train, [(keys, nothing) for keys in runs.values()]) == [[0] * len(runs)] * 2
    for one, other in alike:
        wanted, found = rows(tmp_path / one), rows(tmp_path / other)
        assert len(wanted) == len(found) == STEPS
        for a, b in zip(wanted, found, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6), other
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6), other


def test_adam_w_mode_says_how_weights_decay(tmp_path: Path) -> None:
    """true is AdamW; false is another function, and the same on one rank and two."""

    def of(name: str, kind: str, **params: Any) -> dict[str, Any]:
        keys = document(tmp_path, name, {"zero": 2}, train={"steps": STEPS})
        keys["optimizer"] = {
            "type": kind,
            "params": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.5, **params},
        }
        return keys

    cases = [
        of("w", "AdamW"),
        of("true", "Adam", adam_w_mode=True),
        of("false", "Adam", adam_w_mode=False),
    ]
    run_ranks(2, train, [(keys, nothing) for keys in cases])
    run_ranks(1, train, [(of("one", "Adam", adam_w_mode=False), nothing)])
    losses = {
        name: [row["loss"] for row in rows(tmp_path / name)]
        for name in ("w", "true", "false", "one")
    }
    assert losses["w"] == losses["true"] and losses["false"] == pytest.approx(
        losses["one"], rel=1e-6
    )
    assert losses["false"][-1] != pytest.approx(losses["w"][-1], rel=1e-4)


def test_a_loss_scale_counts_overflows_in_a_row_or_all_and_has_an_end(tmp_path: Path) -> None:
    """Overflows at steps 2 and 4 with a hysteresis of 2: the second halves the scale unless only those in a row count.
    At the lowest scale an overflow is a gradient that is not finite."""
    plant = functools.partial(spoilt, on=1, at={2, 4}, factor=1e7)

    def of(name: str, **keys: Any) -> dict[str, Any]:
        fp16 = {"enabled": True, "initial_scale_power": 10, "hysteresis": 2, **keys}
        return document(tmp_path, name, {"zero": 2}, train={"steps": 5}, fp16=fp16)

    cases = [
        of("all"),
        of("row", consecutive_hysteresis=True),
        of("end", min_loss_scale=1024, hysteresis=1),
    ]
    first, second = run_ranks(2, train, [(keys, plant) for keys in cases])
    assert (
        first == second
        and first[:2] == [0, 0]
        and str(first[2]).startswith("step 2: gradient norm is ")
    )
    scales = {name: [row["loss_scale"] for row in rows(tmp_path / name)] for name in ("all", "row")}
    assert scales == {"all": [1024] * 4 + [512], "row": [1024] * 5}, json.dumps(scales)
