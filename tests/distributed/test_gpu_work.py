"""Runs the work of the ranks in tests/gpu on a CPU, so that those tests work when there is a GPU."""

import contextlib
import re
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

from megalite.config import Config, check_model
from megalite.data.loader import TrainData
from megalite.model.families import read_spec
from megalite.pipeline.actions import Pipeline
from megalite.pipeline.interpreter import Interpreter
from tests.gpu.configs import MODELS, config, figures, large, llama_7b_of_64
from tests.ranks import run_ranks

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


def attention(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, list[str]]]:
    from tests.gpu import work

    return work.attention_differences("cpu"), work.kernels("cpu")


def test_attention_of_every_kind() -> None:
    ((differences, kernels),) = run_ranks(1, attention)
    assert len(differences) == len(kernels) == 6 and 0 < max(differences.values()) < 0.03
    assert all("aten::scaled_dot_product_attention" in names for names in kernels.values())


def steps(rank: int, world_size: int, documents: list[dict[str, Any]]) -> list[Any]:
    """Losses, states, waits and throughput; CUDA-only calls do nothing."""
    from tests.gpu import work

    deepspeed.init_distributed("gloo")
    results = []
    with contextlib.ExitStack() as stack:
        modes: list[str] = []
        stack.enter_context(mock.patch.object(torch.cuda, "set_sync_debug_mode", modes.append))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: None))
        for document in documents:
            told, held = work.states(document)
            results.append((work.losses(document, 2), told == held, work.waits(document, 1)))
        results.append(work.throughput(documents[0], 1))
        assert "error" in modes and modes[-1] == "default"
    return results


def test_steps_of_every_kind(tmp_path: Path) -> None:
    documents = [
        config(tmp_path, zero=zero, precision="bf16" if zero else "fp32", model=dict(SMALL),
               data={"reset_attention": True, "sequence_length": 32}, train_batch_size=4)
        for zero in (0, 1, 2, 3)
    ]  # fmt: skip
    ((*of_stages, told),) = run_ranks(1, steps, documents)
    for losses, predicted, waits in of_stages:
        assert len(losses) == 2 and predicted and waits == [0]
    assert told["tokens_per_second"] > 0 and 0 < told["mfu"] < 2
    assert re.match(r"0\.\d\d B parameters, [\d,]+ tokens/s, .* GiB$", figures(told))


def waits_found(rank: int, world_size: int, document: dict[str, Any]) -> list[int]:
    """Counts without a wait for the whole device, and with one before the forwards; with one in them, an error."""
    from tests.gpu import work

    deepspeed.init_distributed("gloo")
    run, update = Interpreter.run, Pipeline.train_step

    def waiting(self: Interpreter, *args: Any) -> None:
        run(self, *args)
        torch.cuda.synchronize()

    def updating(self: Pipeline, *args: Any) -> torch.Tensor:
        torch.accelerator.synchronize()
        return update(self, *args)

    with (
        mock.patch.object(torch.cuda, "set_sync_debug_mode", lambda mode: None),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
        mock.patch.object(torch.accelerator, "synchronize", lambda: None),
    ):
        counts = work.waits(document, 1)
        with mock.patch.object(Pipeline, "train_step", updating):
            counts += work.waits(document, 2)
        with (
            mock.patch.object(Interpreter, "run", waiting),
            pytest.raises(RuntimeError, match="waited for the whole device"),
        ):
            work.waits(document, 1)
    return counts


def test_waits_for_the_whole_device_are_found(tmp_path: Path) -> None:
    document = config(
        tmp_path, 2, zero=1, parallel={"pipe": 2}, model=dict(SMALL),
        data={"sequence_length": 32}, train_batch_size=4,
    )  # fmt: skip
    assert run_ranks(2, waits_found, document) == [[0, 1, 1]] * 2


def in_a_fake_world(rank: int, world_size: int, document: dict[str, Any]) -> list[Any]:
    from tests.gpu import work

    deepspeed.init_distributed("gloo")
    return [work.true_size(document, place) for place in (0, 5, 7)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ranks_of_a_world_that_is_not_there(tmp_path: Path) -> None:
    document = config(tmp_path, 8, parallel={"pipe": 2, "tensor": 2}, model=dict(SMALL))
    for told, held, peak in run_ranks(1, in_a_fake_world, document)[0]:
        assert told == held and peak > 0


def test_configs_of_true_size(tmp_path: Path) -> None:
    config(tmp_path)  # writes the corpus
    documents = [large(tmp_path, name, train={"compile": True}) for name in MODELS]
    overlapped = {"stage": 1, "overlap_comm": True}
    documents += [large(tmp_path, "1B", ranks=2, zero_optimization=overlapped)]
    for document in (llama_7b_of_64(tmp_path), *documents):
        resolved = Config.from_dict(document)
        spec = read_spec(resolved.model)
        check_model(resolved, spec)
        data = TrainData(resolved.data, 1, spec.vocabulary_size, check=False)
        assert data.batch([0, 7])[0].shape == (2, 4096)
