"""A start: what rank 0 prepared reaches the other ranks of its node, and nodes whose files differ are refused."""

import os
from pathlib import Path
from typing import Any

import pytest

from megalite.ranks import launch
from megalite.training import pretrain
from tests.ranks import RankFailure, run_ranks


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


def test_what_differs_is_named_by_its_key() -> None:
    config = "ds_configs/tiny_cpu.json"
    first = pretrain.prepare(config, [], 8, thorough=False)
    assert pretrain._differs(first, pretrain.prepare(config, [], 8, thorough=False)) is None
    own = pretrain.prepare(config, ["megalite.train.seed=7"], 8, thorough=False)
    seed = first.config.train.seed
    line = f"megalite.train.seed: 7: must be {seed}, as on the node of rank 0"
    assert pretrain._differs(first, own) == line
