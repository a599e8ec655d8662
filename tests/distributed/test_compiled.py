"""`megalite.train.compile`: training with compiled pieces equals training without within the bounds of
tools/verify_layouts.py, on the ZeRO stages and through a pipe that halves backward; the functions given to the
compiler equal those that they replace; and what is kept for backward."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.model import activation, compiled, dropout, rotary
from megalite.model.families import read_spec
from megalite.model.spec import Activation
from megalite.parallel.grid import Grid
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.verify import Spread
from tests.distributed.test_activations import measured, predicted
from tests.families import FAMILY_CONFIGS
from tests.ranks import run_ranks
from tests.traces import Request, document, marked_corpus, nothing, traces

STEPS, BATCH = 4, 8
PIECES = 4  # gates and turns, forward and backward
ACTIVATIONS: tuple[Activation, ...] = ("silu", "relu", "gelu", "gelu_tanh")
LAYOUTS = [
    Layout(data=2, zero=3, micro=2), Layout(data=2, zero=1, micro=2), Layout(data=2, zero=0, micro=2),
    Layout(pipe=2, zero=2, micro=2, schedule="zb-v"), Layout(pipe=2, zero=1, micro=2),
]  # fmt: skip


@pytest.fixture
def as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions for the compiler, without compiling them."""
    for module in (activation, rotary):
        monkeypatch.setattr(module, "compiles", lambda: True)
        monkeypatch.setattr(module, "compiled", lambda function: function)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gates_equal_autograds(kind: Activation, as_they_are: None) -> None:
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    made = activation.gated(gate, up, kind)
    wanted = activation.activate(gate, kind) * up
    torch.testing.assert_close(made, wanted)
    slope = torch.randn_like(made)
    of_made, of_wanted = (torch.autograd.grad(y, (gate, up), slope) for y in (made, wanted))
    for one, other in zip(of_made, of_wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rest", [0, 3])
def test_turns_equal_those_in_parts(interleaved: bool, rest: int, as_they_are: None) -> None:
    x = torch.randn(2, 3, 5, 8 + rest, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(2, 1, 5, 4, dtype=torch.float64)
    cosine, sine = rotary.spread(angles.cos(), interleaved), angles.sin()
    made = rotary.rotate(x, cosine, sine, interleaved)
    wanted = rotary._turned(x.detach(), cosine, sine, interleaved, 1)
    torch.testing.assert_close(made.detach(), wanted)
    assert made.stride() == wanted.stride()
    slope = torch.randn_like(made)
    (of_x,) = torch.autograd.grad(made, x, slope)
    torch.testing.assert_close(of_x, rotary._turned(slope, cosine, sine, interleaved, -1))


@pytest.mark.parametrize("family", ["llama", "modernbert", "qwen2_moe", "qwen3_moe"])
def test_what_is_kept_is_predicted(family: str, as_they_are: None) -> None:
    config, dtype = FAMILY_CONFIGS[family], torch.bfloat16
    parts, whole = measured(config, Grid(), dtype, 0, False, False)
    told = [
        predicted(read_spec(config), Grid(), dtype, 0, False, False, compiled=is_compiled)
        for is_compiled in (True, False)
    ]
    near = 1e-3  # a scalar
    assert whole == pytest.approx(told[0][1], rel=near) != pytest.approx(told[1][1], rel=near)
    tables = [sum(table.values()) for table in told[0][0]]
    assert parts == pytest.approx(tables, rel=near)


def masks(rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Masks of several sizes and rates, as the compiler generates them for GPUs and without it."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    compiled.compile_pieces(True)
    made = []
    for rate, sizes in ((0.1, (2, 3, 5, 70)), (0.5, (1, 1, 64, 257)), (1e-9, (2, 1, 3, 8))):
        states = dropout._mixed(torch.randint(-(2**62), 2**62, sizes[:-1]))
        inner = dropout._counter(range(sizes[-1]), states.device)
        limit = inner.new_full((), int(rate * 2**64) - 2**63)
        values = states, inner, limit
        made.append((compiled.compiled(dropout._below)(*values), dropout._below(*values)))
    return made


def test_masks_are_the_same_to_the_bit() -> None:
    for found in run_ranks(1, masks):
        for one, other in found:
            assert one.dtype == torch.bool and torch.equal(one, other)


@contextlib.contextmanager
def with_a_compiler(rank: int) -> Iterator[None]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as a rank on a CPU starts with
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    yield
    assert compiled.compiles()
    if before == 0:
        assert counters["stats"]["unique_graphs"] >= PIECES


@pytest.mark.timeout(200)
def test_training_with_compiled_pieces_is_training(tmp_path: Path) -> None:
    corpus = marked_corpus(tmp_path / "corpus")

    def request(layout: Layout, compiles: bool) -> Request:
        json: dict[str, Any] = document(corpus, "llama", True, BATCH)
        json["megalite"]["train"]["compile"] = compiles
        config = config_of(Config.from_dict(json), layout, BATCH)
        return config.to_json(), with_a_compiler if compiles else nothing, tmp_path / f"{layout}"

    alone = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
    reference, *others = traces(1, STEPS, [request(layout, False) for layout in alone])
    spread = Spread(reference, others)
    found = traces(2, STEPS, [request(layout, True) for layout in LAYOUTS])
    for layout, trace in zip(LAYOUTS, found, strict=True):
        assert not spread.judge(trace).first, layout


def test_a_compiler_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match="megalite.train.compile: true: needs the C\\+\\+ compiler no-such"
    ):
        compiled.check_compiler()


def test_on_gpus_triton_and_what_it_builds_with_must_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacking = "megalite.train.compile: true: needs {} on each node: not found"
    monkeypatch.setattr(compiled, "machine_has_gpu", lambda: True)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=lacking.format("the package triton")):
        compiled.check_compiler()
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match=f"Python's headers .*{tmp_path}/Python.h"):
        compiled.check_compiler()
    (tmp_path / "Python.h").touch()
    compiled.check_compiler()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match=lacking.format("the C compiler no-such-compiler")):
        compiled.check_compiler()
