"""Show the contents of a checkpoint and the layout that wrote it; with --verify also check that no byte is damaged."""

from pathlib import Path

from megalite.checkpoint.files import Checkpoint, checkpoints_of, find_checkpoint, verify
from megalite.checkpoint.folder import SUMS
from megalite.checkpoint.inspect import described
from megalite.errors import CheckpointError
from megalite.inputs import reading
from megalite.ranks.arguments import ArgumentParser


def main(argv: list[str]) -> int:
    """The program; returns its exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder for its newest one"
    )
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")
    parser.add_argument("--tensors", action="store_true", help="list every weight")
    options = parser.parse_args(argv)
    path = Path(options.checkpoint)
    with reading(path, CheckpointError):
        run_dir = path.parent if path.name == "checkpoints" else path
        found = [path] if (path / SUMS).exists() else checkpoints_of(run_dir)
        folder = found[-1] if found else find_checkpoint(path)
        lines = list(described(Checkpoint.open(folder), options.tensors))
    for line in lines:
        print(line)
    if options.verify:
        verify(folder)
        print("  whole: every file matches its SHA-256")
    return 0
