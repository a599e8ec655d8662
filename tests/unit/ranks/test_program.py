"""How programs end."""

import pytest

from megalite.errors import ConfigError
from megalite.ranks.program import print_line


def test_a_line_of_an_error_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(ConfigError(f"{'x' * 5000}: must not be\nso long"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("x: must not be so long\n") and len(said) < 1100
