"""The operations of a backward: they free all that forward keeps, and each weight gets its gradient. Their peak is
compared with torch in tests/distributed/test_peaks.py."""

from dataclasses import replace

import pytest
import torch

from megalite.model.families import read_spec
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Recompute, Stage
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Axis, Grid
from megalite.plan.activations import Forward
from megalite.plan.backward import Op, layer_ops
from megalite.plan.chunk_tables import ChunkPart
from megalite.plan.gradients import GradientMemory, Moment, Reduction
from megalite.plan.memory_timeline import ChunkMemory
from tests.small_models import MODELS

FAMILIES = ("llama", "gpt2", "bert", "modernbert", "mixtral", "qwen2_moe", "t5")


def chunk_of(
    spec: TransformerSpec,
    recompute: Recompute,
    dtype: torch.dtype,
    tensor: int = 1,
    first: bool = True,
) -> ChunkMemory:
    axis = Axis(tensor, tensor - 1, tuple(range(tensor)), None)
    source = 0 if spec.stacks is None else 6
    at = Forward(3, 16, dtype, Split(axis), source=source)
    part = ChunkPart(range(spec.num_layers), first, last=True)
    return ChunkMemory(spec, part, recompute, at, has_head=True)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("recompute", [0, 1, 2, "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backward_frees_what_forward_keeps(
    family: str, recompute: Recompute, tensor: int
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        chunk = chunk_of(read_spec(MODELS[family]), recompute, dtype, tensor)
        assert sum(op.freed - op.made for op in chunk.backward) == chunk.kept
        assert all(op.made >= 0 or op == chunk.head_op for op in chunk.backward)
        chunk = chunk_of(read_spec(MODELS[family]), recompute, dtype, tensor, first=False)
        left = chunk.kept - sum(op.freed - op.made for op in chunk.inner)
        assert left - chunk.waiting == -chunk.head_op.made + chunk.head_op.freed


def test_layers_without_rotary_positions_have_no_operations_for_them() -> None:
    spec = replace(read_spec(MODELS["llama"]), nope_layers=(1,))
    at = Forward(3, 16, torch.float32, Split(Axis(1, 0, (0,), None)))
    turned, plain = layer_ops(spec, 0, at), layer_ops(spec, 1, at)
    of_key_and_query = [Op(4 * 3 * 16 * size, 4 * 3 * 16 * size) for size in (16, 32)]
    for op in of_key_and_query:
        turned.remove(op)
    assert turned == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_gets_a_gradient(family: str) -> None:
    """Except biases and other small ones."""
    spec = read_spec(MODELS[family])
    with torch.device("meta"):
        numbers = sum(value.numel() for value in Stage(spec, Grid()).parameters())
    chunk = chunk_of(spec, 0, torch.float32)
    given = sum(count for op in chunk.backward for count in op.weights)
    assert given == pytest.approx(numbers, rel=0.06)


def rules(zero: int, width: int = 2, bucket: int = 100) -> Reduction:
    sums = 4 * 300 if zero in (1, 2) else 0
    return Reduction(zero, width, 600, (250, 50), sums, bucket, 1, 2, False)


def walked(zero: int, backwards: int) -> list[Moment]:
    """The bytes after each backward of a chunk that has two weights of 300 elements and keeps nothing else."""
    gradients, found = GradientMemory.begin(rules(zero)), []
    for _ in range(backwards):
        gradients.backward(0, [Op(0, 0, (300,)), Op(0, 0, (300,))])
        found.append(Moment(**vars(gradients.now)))
    return found


def test_gradients_come_with_the_first_backward() -> None:
    for zero in (0, 1):
        assert [moment.gradients for moment in walked(zero, 2)] == [2400, 2400]
    assert [moment.gradients for moment in walked(2, 2)] == [1200, 1200], "those that it owns"
    assert [moment.gradients for moment in walked(3, 2)] == [0, 0], "they are part of the states"
    assert [moment.buckets for moment in walked(1, 1)] == [400], "until the reduction"
    assert [moment.buckets for moment in walked(2, 1)] == [0]


def test_gradients_are_flattened_at_the_end_of_a_step() -> None:
    half, whole = (GradientMemory.begin(rules(1, width)) for width in (2, 4))
    for gradients in (half, whole):
        gradients.now.gradients, gradients.now.buckets = 2400, 400
        gradients.end()
        assert gradients.now == Moment(0, 1200, 0)
    # The first bucket's gradients are in the bucket when the part that the rank owns is allocated.
    assert half.most == Moment(0, 2400 - 400 + 1200, 400)
    assert whole.most.total >= 1200 + 4 * 250
