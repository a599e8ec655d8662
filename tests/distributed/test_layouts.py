"""Any layout, the same training: losses, norms and weights against one process, and against transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megalite.convert.names import from_hf
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from tests.ranks import run_ranks
from tests.small_models import Layout, Task, train

LAYOUTS = [
    Layout(data=2, stage=0),
    Layout(data=2, stage=1, micro=1),
    Layout(data=2, stage=2, micro=4),
    Layout(tensor=2, stage=1),
    Layout(pipe=2, stage=0, recompute=True),
    Layout(pipe=4, stage=2, micro=1),
    Layout(pipe=2, tensor=2, stage=2),
    Layout(pipe=2, data=2, stage=1),
    Layout(pipe=2, tensor=2, data=2, stage=1, micro=1),
    Layout(pipe=2, tensor=2, data=2, stage=2, recompute=True),
]
ONCE = [
    (Layout(data=2, stage=3), True),
    (Layout(tensor=2, data=2, stage=3), False),
    (Layout(data=2, stage=1, offload=True), True),
    (Layout(data=2, stage=2, offload=True), False),
    (Layout(data=2, stage=3, offload=True), True),
]
CASES = [(layout, tied) for layout in LAYOUTS for tied in (True, False)] + ONCE
_references: dict[Task, dict[str, Any]] = {}


def reference(task: Task) -> dict[str, Any]:
    if task not in _references:
        _references[task] = run_ranks(1, train, Layout(), task)[0]
    return _references[task]


def gathered(results: list[dict[str, Any]], like: dict[str, Any]) -> dict[str, np.ndarray]:
    """Full tensors from every rank's slices; copies of one slice must be equal to the bit."""
    full = {name: np.full_like(value, np.nan) for name, (_, value) in like["slices"].items()}
    for result in results:
        for name, (offsets, value) in result["slices"].items():
            box = full[name][tuple(slice(o, o + n) for o, n in zip(offsets, value.shape, strict=True))]
            assert np.isnan(box).all() or np.array_equal(box, value), f"{name}: two copies differ"
            box[...] = value
    assert not any(np.isnan(value).any() for value in full.values())
    return full


def case_name(value: Any) -> str:
    if isinstance(value, bool):
        return "tied" if value else "untied"
    return f"p{value.pipe}t{value.tensor}d{value.data}z{value.stage}m{value.micro}{'-offload' * value.offload}"


@pytest.mark.parametrize("layout, tied", CASES, ids=case_name)
def test_layout_equals_one_process(layout: Layout, tied: bool) -> None:
    task = Task("gpt2" if tied else "llama", tied)
    expected, results = reference(task), run_ranks(layout.world_size, train, layout, task)
    assert max(expected["norms"]) > task.clipping, "clipping must act"
    for result in results:
        assert result["losses"] == results[0]["losses"] and result["norms"] == results[0]["norms"]
    np.testing.assert_allclose(results[0]["losses"], expected["losses"], rtol=1e-6)
    np.testing.assert_allclose(results[0]["norms"], expected["norms"], rtol=2e-5)
    for name, value in gathered(results, expected).items():
        wanted = expected["slices"][name][1]
        assert np.linalg.norm(value - wanted) < 2e-5 * np.linalg.norm(wanted) + 1e-7, name


def test_pipe_alone_changes_no_bit_of_an_untied_model() -> None:
    task = Task("llama", tied=False)
    expected = run_ranks(1, train, Layout(stage=1), task)[0]
    results = run_ranks(2, train, Layout(pipe=2, stage=1), task)
    assert results[0]["losses"] == expected["losses"]
    assert results[0]["norms"] == expected["norms"]
    for name, value in gathered(results, expected).items():
        assert np.array_equal(value, expected["slices"][name][1]), name


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_keeps_near_one_process(stage: int) -> None:
    task = Task("llama", tied=False)
    one = run_ranks(1, train, Layout(stage=1, dtype="bf16"), task)[0]
    other = run_ranks(4, train, Layout(pipe=2, data=2, stage=stage, dtype="bf16"), task)[0]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-3)
    np.testing.assert_allclose(other["norms"], one["norms"], rtol=2e-2)


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("gpt2", True)])
def test_training_equals_transformers_and_torch(family: str, tied: bool) -> None:
    """The same weights and batches through transformers' model, torch's AdamW and clip_grad_norm_."""
    task = Task(family, tied)
    ours = reference(task)
    config = AutoConfig.for_model(**task.section)
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config)
    start = Stage(read_spec(task.section), Grid()).initialise(seed=1)
    theirs = model.state_dict()
    with torch.no_grad():
        for value, place in placed(start):
            from_hf(family, place.name, theirs.__getitem__).copy_(value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, eps=1e-4, weight_decay=0.01)
    for step in range(task.steps):
        tokens, labels = task.samples(step)
        logits = model(tokens).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.clipping)
        optimizer.step()
        optimizer.zero_grad()
        assert ours["losses"][step] == pytest.approx(loss.item(), rel=1e-5)
        assert ours["norms"][step] == pytest.approx(norm.item(), rel=1e-4)
    for name, (_, value) in ours["slices"].items():
        wanted = from_hf(family, name, theirs.__getitem__).detach().numpy()
        assert np.linalg.norm(value - wanted) < 1e-4 * np.linalg.norm(wanted) + 1e-6, name
