"""A start: what rank 0 prepared reaches the other ranks of its node, and nodes whose files differ are refused. And the
end of a rank that fails."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megalite.errors import DataError
from megalite.ranks import launch
from megalite.ranks.run_program import run_program
from megalite.training import pretraining
from tests.ranks import RankFailure, run_ranks
from tests.training_runs import document


def started(rank: int, world_size: int, nodes: bool, files: list[str]) -> Any:
    """The result of a start on each rank. nodes: whether each rank is alone on its node."""
    if nodes:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")

    def prepare(thorough: bool) -> tuple[str, int]:
        return Path(files[rank]).read_text(), os.getpid()

    def differs(first: tuple[str, int], own: tuple[str, int]) -> str | None:
        return None if first[0] == own[0] else f"text: {own[0]}: must be {first[0]}"

    _, prepared = launch.start_ranks(prepare, differs=differs)
    launch.stop_ranks()
    return prepared


def files_of(tmp_path: Path, *texts: str) -> list[str]:
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_text(text)
    return [str(tmp_path / str(number)) for number in range(len(texts))]


def test_the_ranks_of_a_node_get_what_its_first_prepared(tmp_path: Path) -> None:
    first, second = run_ranks(2, started, False, files_of(tmp_path, "a", "b"), init=False)
    assert first == second and first[0] == "a"


def test_each_node_prepares_for_itself(tmp_path: Path) -> None:
    first, second = run_ranks(2, started, True, files_of(tmp_path, "a", "a"), init=False)
    assert first[0] == second[0] and first[1] != second[1]


def test_nodes_whose_files_differ_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, started, True, files_of(tmp_path, "a", "b"), init=False)
    text = str(failure.value)
    assert "died with exit code 2" in text and text.count("text: b: must be a") == 1, text


def test_a_mistake_on_rank_0_alone_reaches_the_other_nodes(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="died with exit code 1"):
        run_ranks(2, started, True, [str(tmp_path / "none"), str(tmp_path)], init=False)


def fails_alone(rank: int, world_size: int, config: str, error: type[Exception]) -> None:
    """A run of which rank 1 fails while rank 0 waits for it, where leaving the world takes until all ranks leave it, as
    under NCCL."""

    def train(prepared: pretraining.PreparedRun, rank: int) -> int:
        if rank == 1:
            raise error("a token is beyond the vocabulary")
        dist.barrier()
        return 0

    sys.argv = ["pretrain.py", "--deepspeed_config", config]
    with (
        mock.patch.object(pretraining, "_train", train),
        mock.patch.object(dist, "destroy_process_group", lambda: time.sleep(3600)),
    ):
        run_program(pretraining.main)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError, 2, "pretrain.py: a token is beyond the vocabulary"),
        (RuntimeError, 1, "RuntimeError: a token is beyond the vocabulary"),
    ],
)
def test_a_rank_that_fails_alone_ends_at_once(
    tmp_path: Path, error: type[Exception], code: int, line: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document(tmp_path, "run", {})))
    with pytest.raises(RankFailure) as failure:
        run_ranks(
            2, fails_alone, str(tmp_path / "config.json"), error, init=False, timeout_seconds=20
        )
    text = str(failure.value)
    assert f"died with exit code {code}" in text and text.count(line) == 1, text


def test_what_differs_is_named_by_its_key() -> None:
    config = "ds_configs/tiny_cpu.json"
    first = pretraining.prepare(config, [], 8, thorough=False)
    assert pretraining._differs(first, pretraining.prepare(config, [], 8, thorough=False)) is None
    own = pretraining.prepare(config, ["megalite.train.seed=7"], 8, thorough=False)
    seed = first.config.train.seed
    line = f"megalite.train.seed: 7: must be {seed}, as on the node of rank 0"
    assert pretraining._differs(first, own) == line
