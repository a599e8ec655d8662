"""How layouts are compared (megalite/prove/verify.py, trace.py), on traces that the test writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megalite.prove.layouts import Layout
from megalite.prove.trace import Trace
from megalite.prove.verify import Spread, Verdict, _changes, _slope, differences, table

Values = dict[str, Tensor]
ADAM = {"lr": 1e-2, "groups": [], "beta1": 0.9, "beta2": 0.95, "eps": 1e-4}
STEPS = 2


def weights(step: int) -> Values:
    """Two tensors after a step; -1: before the first step."""
    generator = torch.Generator().manual_seed(1)
    start = {"a": torch.randn(6, 4, generator=generator), "b": torch.randn(4, generator=generator)}
    moves = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
    return {name: value + 0.01 * (step + 1) * moves[name] for name, value in start.items()}


def place(full: Tensor, first: int, rows: int, counted: bool = True) -> dict[str, Any]:
    shape, offsets = list(full.shape), [0] * full.dim()
    shape[0], offsets[0] = rows, first
    return {
        "full_shape": list(full.shape), "shape": shape, "offsets": offsets, "start": 0, "counted": counted,
    }  # fmt: skip


def written(folder: Path, change: Callable[[int, int, Values], Any] | None = None) -> Trace:
    """A trace: rank 0 holds the first rows of a and all of b, rank 1 the other rows and a copy of b. change: called
    with step, rank and the rank's values by key before they are written."""
    folder.mkdir()
    for rank, (first, rows) in enumerate(((0, 4), (4, 2))):
        slices = {}
        for step in range(-1, STEPS):
            full = weights(step)
            held = {
                "weight/a": full["a"][first : first + rows].flatten().clone(),
                "weight/b": full["b"].clone(),
            }
            slices = {
                "weight/a": place(full["a"], first, rows),
                "weight/b": place(full["b"], 0, 4, counted=rank == 0),
            }
            if change is not None:
                change(step, rank, held)
            name = f"step{step}" if step >= 0 else "start"
            save_file(held, folder / f"{name}_rank{rank}.safetensors")
        figures = [{"loss": 3.0 - step, "norm": 0.5} for step in range(STEPS)]
        record = {"figures": figures, "slices": slices, "adam": None}
        (folder / f"rank{rank}.json").write_text(json.dumps(record))
    return Trace(folder)


def rounded(factor: float) -> Callable[[int, int, Values], None]:
    def change(step: int, rank: int, held: Values) -> None:
        for value in held.values():
            value *= 1 + factor

    return change


@pytest.fixture
def spread(tmp_path: Path) -> Spread:
    """The spread of one process and the same with other rounding."""
    return Spread(written(tmp_path / "one"), [written(tmp_path / "other", rounded(1e-7))])


def judged(spread: Spread, folder: Path, change: Callable[[int, int, Values], Any]) -> Verdict:
    return spread.judge(written(folder, change))


def test_a_trace_puts_full_tensors_together(tmp_path: Path) -> None:
    trace = written(tmp_path / "one")
    assert trace.steps == STEPS and trace.shapes == {"weight/a": (6, 4), "weight/b": (4,)}
    for step in range(-1, STEPS):
        found = trace.weights(step)
        assert all(torch.equal(found[name], value) for name, value in weights(step).items())


def test_rounding_agrees(spread: Spread, tmp_path: Path) -> None:
    verdict = judged(spread, tmp_path / "x", rounded(-1e-7))
    assert verdict.first == [] and 0 < max(verdict.worst.values()) <= 1
    assert not _changes(spread.reference, written(tmp_path / "y", rounded(-1e-7)))


def test_a_changed_element_is_named_with_step_tensor_and_rank(
    spread: Spread, tmp_path: Path
) -> None:
    def change(step: int, rank: int, held: Values) -> None:
        if step == 1 and rank == 1:
            held["weight/a"][6] += 0.01

    (found,) = judged(spread, tmp_path / "x", change).first
    # Relative to its norm the update differs most; the weight also differs.
    assert (found.step, found.what, found.rank) == (2, "update/a", 1)
    assert found.ratio > found.bound
    assert str(found).startswith("step 2: update/a on rank 1 differs by ")
    assert _changes(spread.reference, Trace(tmp_path / "x"))


def test_a_copy_that_is_stale_is_infinitely_far_off(spread: Spread, tmp_path: Path) -> None:
    def change(step: int, rank: int, held: Values) -> None:
        if step == 0 and rank == 1:
            held["weight/b"] = weights(-1)["b"]

    (found,) = judged(spread, tmp_path / "x", change).first
    assert (found.step, found.what, found.rank) == (1, "weight/b", 1)
    assert found.ratio == float("inf")


def test_a_missing_decay_shows_in_the_update(spread: Spread, tmp_path: Path) -> None:
    """A thousandth of an update is negligible compared with the weight."""

    def change(step: int, rank: int, held: Values) -> None:
        if step >= 0:
            start = weights(-1)
            rows = slice(0, 4) if rank == 0 else slice(4, 6)
            held["weight/a"] -= 0.001 * (held["weight/a"] - start["a"][rows].flatten())

    first = judged(spread, tmp_path / "x", change).first
    assert [found.what for found in first] == ["update/a"]


def test_elements_that_no_rank_holds_are_found(spread: Spread, tmp_path: Path) -> None:
    trace = written(tmp_path / "x")
    trace.slices[1]["weight/a"]["counted"] = False
    found = {key: ratio for key, ratio, _ in differences(spread.reference, trace, 0)}
    assert found["weight/a"] == float("inf") and found["weight/b"] < 1e-6
    del trace.slices[0]["weight/b"], trace.slices[1]["weight/b"]
    del trace.__dict__["shapes"]
    assert ("weight/b", float("inf"), 0) in [*differences(spread.reference, trace, 0)]


def test_losses_are_compared_on_every_rank(spread: Spread, tmp_path: Path) -> None:
    trace = written(tmp_path / "x")
    trace.figures[1][1]["loss"] = 2.1
    first = spread.judge(trace).first
    assert [(found.step, found.what, found.rank) for found in first] == [(2, "loss", 1)]
    assert first[0].ratio == pytest.approx(0.05)
    trace.figures[0][0]["norm"] = float("nan")
    assert spread.judge(trace).first[0].what == "norm", "what is no number is no agreement"


def test_the_table_has_a_row_for_each_layout(spread: Spread, tmp_path: Path) -> None:
    good = judged(spread, tmp_path / "good", rounded(-1e-7))
    bad = judged(spread, tmp_path / "bad", rounded(0.1))
    layouts = [Layout.parse("pipe=2"), Layout.parse("tensor=2")]
    head, *rows = table(dict(zip(layouts, (good, bad), strict=True))).splitlines()
    assert head.split()[:3] == ["layout", "loss", "norm"]
    for row, layout, word in zip(rows, layouts, ("agrees", "differs"), strict=True):
        assert row.startswith(str(layout)) and row.endswith(word)


def test_the_slope_is_that_of_torchs_adam() -> None:
    """By a small change of each gradient's element, in the third step."""
    gradients = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients[:, 3] = 1e-6  # its terms cancel out
    gradients[:, 5] = 0.0  # an unseen token's

    def trained(change: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weight = torch.zeros(16, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-4)
        for gradient in (*gradients[:2], gradients[2] + change):
            weight.grad = gradient
            optimizer.step()
        return weight.detach(), optimizer.state[weight]

    (weight, state), change = trained(torch.zeros(())), torch.zeros(16, dtype=torch.float64)
    change[3] = 1e-9
    moved, other = trained(change)
    moment = (other["exp_avg"] - state["exp_avg"])[3]
    second, groups = state["exp_avg_sq"], [["*.bias", 0.5], ["*", 3.0]]
    alone, whole = (
        _slope(values, values > 0, "layer.weight", 2, ADAM) for values in (second[3:4], second)
    )
    assert alone == pytest.approx(abs((moved - weight)[3] / moment).item(), rel=0.05)
    assert alone > 0.9 * whole, "one element outweighs all others"
    halved = _slope(second, second > 0, "layer.bias", 2, ADAM | {"groups": groups})
    assert halved == pytest.approx(whole / 2)


def trained_bias(folder: Path, last: float, scale: float = 1.0) -> Trace:
    """A trace of one step of Adam on a bias of four elements, the last of which has the gradient `last`. scale: of the
    update."""
    folder.mkdir()
    gradient = torch.tensor([0.1, -0.2, 0.3, last], dtype=torch.float64)
    start = torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=torch.float64)
    after = start - scale * ADAM["lr"] * gradient / (gradient.abs() + ADAM["eps"])
    values = {"exp_avg/b": 0.1 * gradient, "exp_avg_sq/b": 0.05 * gradient**2, "weight/b": after}
    save_file({"weight/b": start.float()}, folder / "start_rank0.safetensors")
    held = {key: value.float() for key, value in values.items()}
    save_file(held, folder / "step0_rank0.safetensors")
    slices = {key: place(value, 0, 4) for key, value in values.items()}
    record = {"figures": [{"loss": 3.0, "norm": 0.5}], "slices": slices, "adam": ADAM}
    (folder / "rank0.json").write_text(json.dumps(record))
    return Trace(folder)


def test_rounding_that_adam_magnifies_in_one_element_is_no_difference(tmp_path: Path) -> None:
    """The terms of the last element's gradient cancel out, so that it is only rounding."""
    one = trained_bias(tmp_path / "one", 1e-8)
    other = trained_bias(tmp_path / "other", 3e-8)
    faulty = trained_bias(tmp_path / "faulty", 1e-8, scale=1 - 1e-3)

    def update(trace: Trace) -> float:
        return {key: ratio for key, ratio, _ in differences(one, trace, 0)}["update/b"]

    assert update(other) == 0.0 and update(faulty) > 3e-4
    one.adam = None
    assert update(other) > 1e-5
