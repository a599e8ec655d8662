"""Attention in pieces (megalite/model/varlen.py): the kernel's calls, run by a CPU twin, equal attention with a mask;
the kernel itself accepts these arguments on the meta device."""

import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torchs
from torch.nn.functional import scaled_dot_product_attention

import megalite.model.attention as attention
import megalite.model.dropout as dropout
import megalite.model.varlen as varlen
from megalite.model.attention import attend
from megalite.model.context import Context, KeyValueCache
from megalite.model.dropout import Randomness, dropped
from megalite.model.families import read_spec
from megalite.model.spec import TransformerSpec
from megalite.model.varlen import (
    attend_pieces,
    attend_prefixes,
    documents_as_pieces,
    kernel_takes,
    prefixes_as_pieces,
    rows_as_pieces,
)
from megalite.parallel.collectives import Split
from megalite.parallel.grid import ALONE
from megalite.plan.activations import Forward, layer_table
from megalite.training.batches import LazyMicroBatches
from tests.allocations import peak_bytes
from tests.small_models import MODELS

B, S, N, K, H = 3, 24, 4, 2, 8
CPU = torch.device("cpu")


def twin(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    other_starts: Tensor,
    longest: int,
    other_longest: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch's varlen_attn by its documentation: each sequence by itself; a query attends to `left` keys before its own
    and `right` after it, -1: all."""
    assert starts.dtype == torch.int32 and starts is other_starts and longest == other_longest
    left, right = window_size
    result = torch.zeros_like(query)
    for start, stop in zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True):
        assert 0 < stop - start <= longest
        index = torch.arange(stop - start)
        ahead = index.unsqueeze(0) - index.unsqueeze(1)
        seen = ((right < 0) | (ahead <= right)) & ((left < 0) | (-ahead <= left))
        q, k, v = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        result[start:stop] = scaled_dot_product_attention(q, k, v, seen, enable_gqa=enable_gqa)[
            0
        ].transpose(0, 1)
    return result


def documents(seed: int) -> np.ndarray:
    """Document numbers [B, S]; the first row is a single document."""
    generator = np.random.default_rng(seed)
    made = np.cumsum(generator.random((B, S)) < 0.2, axis=1).astype(np.int32)
    made[0] = 0
    return made


def prompts(seed: int, made: np.ndarray) -> np.ndarray:
    """Marks of the first tokens of each document, of some none or all; bool [B, S]."""
    generator = np.random.default_rng(seed)
    found = np.zeros(made.shape, bool)
    for row, numbers in enumerate(made):
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            found[row, places[: generator.integers(0, len(places) + 1)]] = True
    return found


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, heads, S, H, generator=generator, requires_grad=True) for heads in (N, K, K)
    ]


def result_and_gradients(
    context: Context, window: int | None, causal: bool, seed: int
) -> list[Tensor]:
    tensors = inputs(seed)
    query, key, value = tensors
    mixed = attend(query, key, value, context, window, causal, None, 0.0)
    mixed.square().sum().backward()
    return [mixed.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


@pytest.mark.parametrize("window", [None, 1, 5, S - 1, S, 100])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_pieces_equal_a_mask(window: int | None, packed: bool, causal: bool) -> None:
    made = documents(seed=window or 0)
    context = (
        Context(documents=torch.from_numpy(made), bounds=documents_as_pieces(made))
        if packed
        else Context()
    )
    wanted = result_and_gradients(context, window, causal, seed=1)
    asked: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(1)
        return twin(*args, **kwargs)

    with (
        mock.patch.object(torchs, "varlen_attn", counted),
        mock.patch.object(attention, "new_enough", lambda device: True),
        mock.patch.object(attention, "kernel_takes", lambda *args: True),
    ):
        found = result_and_gradients(context, window, causal, seed=1)
    assert bool(asked) == (packed or (window is not None and window < S)), (
        "attention to all, or to all before, has its own kernel"
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, S - 1])
def test_two_calls_equal_a_mask_with_prefixes(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "TILE", 4)
    made = documents(seed=5)
    found = prompts(seed=6, made=made)
    assert 0.2 < found.mean() < 0.8 and found[0, 3]
    context = Context(
        documents=torch.from_numpy(made),
        bounds=documents_as_pieces(made),
        prefixes=torch.from_numpy(found),
        halves=prefixes_as_pieces(made, found),
    )
    lengths = np.diff(context.halves.starts.numpy())  # type: ignore[union-attr]
    assert found.sum(axis=1).max() > 4 and (lengths <= max(4, found.sum(axis=1).max())).all()
    wanted = result_and_gradients(context, window, True, seed=1)
    causal = result_and_gradients(replace(context, prefixes=None, shared={}), window, True, seed=1)
    assert window == 1 or not torch.allclose(wanted[0], causal[0], atol=1e-3)
    kernel = mock.Mock(side_effect=twin)
    with (
        mock.patch.object(torchs, "varlen_attn", kernel),
        mock.patch.object(attention, "new_enough", lambda device: True),
        mock.patch.object(attention, "kernel_takes", lambda *args: True),
    ):
        pieces = result_and_gradients(replace(context, shared={}), window, True, seed=1)
    assert kernel.call_count == 2
    for a, b in zip(pieces, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_cases_that_pieces_cannot_express_use_a_mask() -> None:
    assert Context(visible=torch.ones(B, 1, S, S, dtype=torch.bool)).pieces(B, S, CPU) is None
    assert Context(cache=KeyValueCache(S)).pieces(B, S, CPU) is None
    assert Context(documents=torch.from_numpy(documents(0))).pieces(B, S, CPU) is None, (
        "would wait for the device"
    )
    assert rows_as_pieces(B, S, CPU).starts.tolist() == [0, S, 2 * S, 3 * S]
    starts, longest = documents_as_pieces(np.array([[0, 0, 1, 1], [1, 1, 1, 2]]))
    assert (starts.tolist(), starts.dtype, longest) == ([0, 2, 4, 7, 8], torch.int32, 3)


def test_micro_batches_contain_their_pieces() -> None:
    class Packed:
        def batch(self, positions: Any) -> Any:
            some = documents(0)[: len(positions)]
            return np.zeros(some.shape, np.int64), np.zeros(some.shape, np.int64), some

    (batch,) = LazyMicroBatches(Packed(), 0, B, B, ALONE, CPU, (1, 0)).read()
    wanted = documents_as_pieces(documents(0))
    assert batch.context.bounds is not None
    assert (
        batch.context.bounds.starts.equal(wanted.starts)
        and batch.context.bounds.longest == wanted.longest
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_kernel_takes_these_arguments(dtype: torch.dtype) -> None:
    starts, _ = rows_as_pieces(B, S, torch.device("meta"))
    pieces = documents_as_pieces(documents(0))._replace(starts=starts)
    for window, causal in ((5, True), (5, False), (None, False)):
        query, key, value = (
            torch.empty(B, n, S, H, dtype=dtype, device="meta", requires_grad=True)
            for n in (N, K, K)
        )
        mixed = attend_pieces(query, key, value, pieces, window, causal)
        assert mixed.shape == query.shape and mixed.dtype == dtype
        mixed.sum().backward()
        assert key.grad is not None and key.grad.shape == key.shape
        prefixes = torch.empty(B, S, dtype=torch.bool, device="meta")
        both = attend_prefixes(query, key, value, pieces, pieces, prefixes, window)
        assert both.shape == query.shape and both.dtype == dtype


def test_where_there_is_a_kernel() -> None:
    assert kernel_takes("cuda", torch.bfloat16, 128)
    for other in (
        ("cpu", torch.bfloat16, 128),
        ("cuda", torch.float32, 128),
        ("cuda", torch.float16, 260),
    ):
        assert not kernel_takes(*other)
    assert not kernel_takes("cuda", torch.bfloat16, 100)
    for family in ("llama", "modernbert"):
        spec = read_spec(MODELS[family] | {"hidden_size": 64})

        def masked(device: str, context: int, spec: TransformerSpec = spec) -> bool:
            at = Forward(
                1, 64, torch.bfloat16, Split(ALONE), documents=True, device=device, context=context
            )
            return "attention: mask" in layer_table(spec, 0, at)

        assert masked("cpu", 1) and not masked("cuda", 1)
        assert masked("cuda", 2) == (family == "modernbert")  # for runs of tokens it is only causal


def test_dropout_of_attention_is_drawn_in_parts() -> None:
    """[B, N, S, T] in eight bytes is 64 MiB, and would be needed several times; only a few parts exist at a time."""
    samples, ranges = torch.arange(2), [range(4), range(1024), range(1024)]
    draw = functools.partial(dropped, Randomness(1, 2, samples), "layers.0.attention", 0.1, ranges)
    mask, part = draw(), dropout.AT_A_TIME["cpu"]
    assert 8 * part <= 2**20 and 8 * dropout.AT_A_TIME_ON_DEVICES <= 2**25, "bytes of a part"
    assert mask.float().mean().item() == pytest.approx(0.1, abs=1e-3)
    assert peak_bytes(draw) < mask.nbytes + 5 * 8 * part
