"""A rank's place, from the variables that launchers set."""

import os

import pytest

from megalite.ranks.place import RankPlace, place


def test_a_rank_learns_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "16",
        "SLURM_TASKS_PER_NODE": "8(x2)",
    }
    task = {
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_NUM_TASKS": "11",
    }
    ranks = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in
           {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip
    places = [
        ({}, RankPlace(0, 1, 0, 1)),
        (batch, RankPlace(0, 1, 0, 1)),  # a single program in the batch script
        (batch | task | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, RankPlace(9, 11, 1, 3)),
        (
            batch | ranks | {"LOCAL_WORLD_SIZE": "2"},
            RankPlace(3, 4, 1, 2),
        ),  # by torchrun, in a batch script
        (ranks | {"LOCAL_SIZE": "2"}, RankPlace(3, 4, 1, 2)),  # by deepspeed
        (mpi, RankPlace(3, 4, 1, 2)),
    ]
    for variables_, wanted in places:
        monkeypatch.setattr(os, "environ", dict(variables_))
        assert place() == wanted
