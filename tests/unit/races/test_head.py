"""The race of the head and its loss (megalite/races/head_race.py), on small sizes: all ways give the same loss."""

import re

import pytest

from megalite.races import head_race


def test_all_ways_make_one_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in {"TOKENS": 64, "HIDDEN": 16, "VOCABULARY": 50}.items():
        monkeypatch.setattr(head_race, name, size)
    head_race.main(rounds=2)
    rows = re.findall(
        r"^(\w+) +(\S.*?) +loss (\S+) .*ratio (\S+) +peak", capsys.readouterr().out, re.M
    )
    assert [(kind, way) for kind, way, _, _ in rows] == [
        ("float32", "megalite"),
        ("float32", "linear + cross_entropy"),
        ("bfloat16", "megalite"),
        ("bfloat16", "linear + cross_entropy"),
        ("bfloat16", "linear + cross_entropy, 16 bits"),
    ]
    losses = [float(loss) for _, _, loss, _ in rows]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert losses[2:4] == pytest.approx([losses[0]] * 2, rel=0.01)
    assert [ratio for _, way, _, ratio in rows if way == "megalite"] == ["1.000"] * 2
