"""How `megalite benchmark --calibrate` uses its measurements."""

from pathlib import Path

import pytest

from megalite.errors import ConfigError
from megalite.prove.benchmark import main
from megalite.prove.calibrate import with_seconds
from megalite.prove.clocks import cores


def test_collectives_use_the_right_clock() -> None:
    row = {"ranks": 4 * cores(), "wall_seconds": 4.0, "processor_seconds": 0.5}
    quiet, busy = (
        with_seconds({"collectives": [row], "others_share": share})[0] for share in (0.0, 0.5)
    )
    assert quiet["seconds"] == 1.0 and busy["seconds"] == 0.5


def test_calibrate_excludes_other_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--calibrate: x: not allowed with --steps"):
        main(["--calibrate", "x", "--steps", "3"])
    with pytest.raises(ConfigError, match="must be a folder"):
        main(["--calibrate", str(tmp_path / "none" / "x.json")])
