"""Ranks that wait for each other at the start."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from megalite.ranks import launch
from megalite.ranks.place import RankPlace


def test_missing_ranks_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.add("came", 1)
    monkeypatch.setattr(launch, "PROGRESS_EVERY", timedelta(seconds=0.2))
    monkeypatch.setattr(launch, "WAIT", timedelta(seconds=0.9))
    with pytest.raises(dist.DistStoreError):
        launch._wait_for_verdict(store, RankPlace(0, 2, 0, 2))
    line = "waiting for other ranks: 1 of 2 ranks have started, 0 are ready"
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 3 and all(told.endswith(f": {line}") for told in said)
    store.set("verdict", "0")
    launch._wait_for_verdict(store, RankPlace(0, 2, 0, 2))
    assert capsys.readouterr().err == ""
