"""Files that rows are appended to, on a disk that is full for some time."""

from pathlib import Path

import pytest

from megalite.checkpoint import appended
from megalite.checkpoint.appended import Appended
from tests.small_disk import Disk


@pytest.mark.parametrize("room", [0, 5, 9])
def test_rows_wait_while_the_disk_is_full(tmp_path: Path, disk: Disk, room: int) -> None:
    """Rows have ten bytes. The disk may have space for part of a row, but the file never contains a partial row."""
    told: list[str] = []
    path = tmp_path / "rows"
    file = Appended(path, told.append)
    file.append(b"row 00001\n")
    disk.room = room
    for number in range(2, 6):
        file.append(f"row {number:05d}\n".encode())
        assert path.read_bytes() == b"row 00001\n"
    assert told == [
        f"{path}: cannot be written: No space left on device; the run continues, rows wait in memory"
    ]
    disk.room = None
    file.append(b"row 00006\n")
    assert told[1:] == [f"{path}: can be written again; no rows were lost"]
    file.append(b"row 00007\n")
    file.close()
    assert (
        path.read_text() == "".join(f"row {number:05d}\n" for number in range(1, 8))
        and len(told) == 2
    )


def test_lost_rows_are_reported(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended, "WAITING_BYTES", 35)
    told: list[str] = []
    path = tmp_path / "rows"
    file = Appended(path, told.append)
    disk.room = 0
    for number in range(1, 6):
        file.append(f"row {number:05d}\n".encode())
    disk.room = None
    file.append(b"row 00006\n")
    assert told[1:] == [f"{path}: can be written again; 2 rows were lost"]
    assert path.read_text() == "".join(f"row {number:05d}\n" for number in range(3, 7))
    disk.room = 0
    file.append(b"row 00007\n")
    file.close()
    assert told[2:] == [told[0], f"{path}: 1 row was lost"]
    assert path.read_text().endswith("row 00006\n")
