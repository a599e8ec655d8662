"""Ranks that wait for each other at the start."""

import os
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from megalite.ranks import launch
from megalite.ranks.rank_info import RankInfo


def test_missing_ranks_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.add("came", 1)
    monkeypatch.setattr(launch, "PROGRESS_EVERY", timedelta(seconds=0.2))
    monkeypatch.setattr(launch, "WAIT", timedelta(seconds=0.9))
    with pytest.raises(dist.DistStoreError):
        launch._wait_for_verdict(store, RankInfo(0, 2, 0, 2))
    line = "waiting for other ranks: 1 of 2 ranks have started, 0 are ready"
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 3 and all(told.endswith(f": {line}") for told in said)
    store.set("verdict", "0")
    launch._wait_for_verdict(store, RankInfo(0, 2, 0, 2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("master", "local_size", "wanted"),
    [("first", 2, "eth3"), ("first", 4, "lo"), ("127.0.0.1", 2, "lo"), ("second", 2, "eth1")],
)
def test_ranks_of_several_nodes_do_not_listen_on_loopback(
    master: str, local_size: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/etc/hosts may give a node's own name the address 127.0.1.1."""
    routes = {"first": "lo", "127.0.0.1": "lo", "second": "eth1", launch.OUTSIDE: "eth3"}
    monkeypatch.setattr(launch, "interface_towards", routes.__getitem__)
    with mock.patch.dict(os.environ, {"MASTER_ADDR": master}):
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        launch._set_environment(RankInfo(0, 4, 0, local_size))
        assert os.environ["GLOO_SOCKET_IFNAME"] == wanted
