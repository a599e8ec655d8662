"""Lines of progress (megalite/data/progress.py)."""

import pytest

from megalite.data import progress


def test_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    assert [*progress.counted("abc", 3, "letters")] == ["a", "b", "c"]
    assert [*progress.counted("abc", 3, "letters", visible=False)] == ["a", "b", "c"]
    assert capsys.readouterr().err == "1 of 3 letters\n2 of 3 letters\n3 of 3 letters\n"
