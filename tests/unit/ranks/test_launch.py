"""A rank's place, the arguments of programs, and signals that a rank hears."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from megalite.errors import ConfigError
from megalite.ranks import launch
from megalite.ranks.launch import ArgumentParser, Place, at_least, place


def test_missing_ranks_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.add("came", 1)
    monkeypatch.setattr(launch, "TOLD", timedelta(seconds=0.2))
    monkeypatch.setattr(launch, "WAIT", timedelta(seconds=0.9))
    with pytest.raises(dist.DistStoreError):
        launch._wait_for_verdict(store, Place(0, 2, 0, 2))
    line = "waiting for other ranks: 1 of 2 ranks have come, 0 are ready"
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 3 and all(told.endswith(f": {line}") for told in said)
    store.set("verdict", "0")
    launch._wait_for_verdict(store, Place(0, 2, 0, 2))
    assert capsys.readouterr().err == ""


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
        ({}, Place(0, 1, 0, 1)),
        (batch, Place(0, 1, 0, 1)),  # a program that the batch script runs by itself
        (batch | task | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, Place(9, 11, 1, 3)),
        (
            batch | ranks | {"LOCAL_WORLD_SIZE": "2"},
            Place(3, 4, 1, 2),
        ),  # by torchrun, in a batch script
        (ranks | {"LOCAL_SIZE": "2"}, Place(3, 4, 1, 2)),  # by deepspeed
        (mpi, Place(3, 4, 1, 2)),
    ]
    for variables_, wanted in places:
        monkeypatch.setattr(os, "environ", dict(variables_))
        assert place() == wanted


def test_an_end_that_is_settled_keeps_its_code() -> None:
    code = "import time; from megalite.ranks.signals import *; listen(); settle(0); print(flush=True); time.sleep(0.5)"
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert rank.stdout is not None and rank.stdout.readline() == b"\n"
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(5) == 0


def test_positional_arguments_may_come_between_options() -> None:
    parser = ArgumentParser()
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=at_least(1))
    given = parser.parse_args(["a=1", "--steps", "3", "b=2"])
    assert (given.overrides, given.steps) == (["a=1", "b=2"], 3)
    with pytest.raises(ConfigError, match="unrecognized arguments: --other"):
        parser.parse_args(["a=1", "--other", "b=2"])
