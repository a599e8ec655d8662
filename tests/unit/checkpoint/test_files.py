"""A checkpoint's folder: boxes, damage, which checkpoints are kept, and that incomplete ones are never used."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from megalite.checkpoint.boxes import boxes_of_range
from megalite.checkpoint.files import (
    Checkpoint,
    CheckpointWriter,
    best_checkpoint,
    checkpoints_of,
    find_checkpoint,
    named_best,
    newest_good,
    newest_named,
    step_name,
    verify,
)
from megalite.checkpoint.folder import (
    BEST,
    INDEX,
    LATEST,
    STATE,
    SUMS,
    Index,
    Transaction,
    file_digest,
)
from megalite.checkpoint.parts import Packed, PartIndex, rows_of
from megalite.checkpoint.save import Saver, owned_boxes
from megalite.errors import CheckpointError
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Placement, Shard

STATE_VALUES = {"step": 3, "consumed_samples": 12, "consumed_tokens": 96, "seed": 1}
MODEL = {"model_type": "llama"}
TENSORS = {"a.weight": torch.arange(35.0).view(5, 7), "b": torch.arange(3.0)}


def write(folder: Path) -> Path:
    with CheckpointWriter(folder, MODEL, STATE_VALUES) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        carried = folder.with_name("generation_config.json")
        carried.write_text('{"eos_token_id": 2}')
        writer.carry(carried)
        carried.unlink()
    return folder


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 9), (6, 1)])
def test_boxes_tile_every_range(shape: tuple[int, ...]) -> None:
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(full.numel()):
        for count in range(full.numel() - start + 1):
            found: list[int] = []
            boxes = list(boxes_of_range(shape, start, count))
            for offsets, sizes, flat in boxes:
                box = (
                    full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                    .flatten()
                    .tolist()
                )
                assert box[0] == flat
                found += box
            assert found == list(range(start, start + count))
            assert len(boxes) <= 2 * len(shape) - 1


def test_a_checkpoint_reads_back_whole_and_in_boxes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(find_checkpoint(write(tmp_path / "step_00000003")))
    assert (
        checkpoint.state["step"] == 3
        and checkpoint.model == MODEL
        and set(checkpoint.names) == set(TENSORS)
    )
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and torch.equal(
            checkpoint.read(name), tensor
        )
    assert torch.equal(checkpoint.read("a.weight", (1, 2), (3, 4)), TENSORS["a.weight"][1:4, 2:6])
    with pytest.raises(CheckpointError, match="c: no such tensor"):
        checkpoint.read("c")
    checkpoint.files.close()  # a removed file that is still open keeps its disk space
    opened = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not [link for link in opened if link.exists() and tmp_path in link.resolve().parents]
    assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])


def test_a_damaged_pointer_names_nothing(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints" / step_name(1))
    for pointer in (LATEST, BEST):
        (tmp_path / "checkpoints" / pointer).write_bytes(b"\xff\xfe")
    assert newest_named(tmp_path) != step_name(1) and named_best(tmp_path) is None


def test_one_flipped_byte_is_found_in_every_file_and_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "step_00000003")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 5
    for path in files:
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                verify(folder)
        path.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=path.name):
            verify(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            verify(folder)
        path.write_bytes(whole)
    verify(folder)
    (folder / "hugging_face" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="hugging_face/tokenizer.json: is not in SHA256SUMS"):
        verify(folder)


def test_sums_are_in_the_form_of_sha256sum(tmp_path: Path) -> None:
    lines = (write(tmp_path / "c") / SUMS).read_text().splitlines()
    assert [line.split("  ")[1] for line in lines[:-1]] == [
        "hugging_face/generation_config.json", INDEX, STATE, "tensors_00000.safetensors"
    ]  # fmt: skip
    assert lines[-1].startswith("# ")


def test_an_index_has_no_blanks(tmp_path: Path) -> None:
    """Of a large run they would be most of it."""
    text = (write(tmp_path / "c") / INDEX).read_text()
    assert text == json.dumps(json.loads(text), separators=(",", ":"))


def test_the_best_is_found_by_its_pointer_and_never_removed_for_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write(tmp_path / "checkpoints" / step_name(step)) for step in (1, 2, 3, 4)]
    (tmp_path / "checkpoints" / BEST).write_text(f"{step_name(2)}\n")
    assert find_checkpoint(best_checkpoint(tmp_path)) == folders[1]
    saver = Saver(tmp_path, keep=3)
    saver.starts_from(4, ())
    size = sum(file.stat().st_size for file in folders[0].rglob("*") if file.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    saver._make_room(size + 1)  # more than the oldest checkpoint frees
    assert checkpoints_of(tmp_path) == [folders[1], folders[3]]


def test_the_newest_good_one_is_taken_and_damaged_ones_are_named(tmp_path: Path) -> None:
    folders = [write(tmp_path / "checkpoints" / step_name(step)) for step in (1, 2, 10)]
    (tmp_path / "checkpoints" / ".step_00000011.partial").mkdir()
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == folders[2]
    (folders[2] / INDEX).write_text("{}")
    good, damaged = newest_good(tmp_path)
    assert good == folders[1] and INDEX in str(damaged[0])
    for folder in folders:
        (folder / STATE).unlink()
    with pytest.raises(CheckpointError, match="state.json: cannot be read"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


def test_a_replaced_checkpoint_counts_until_the_new_one_is_complete(tmp_path: Path) -> None:
    """As after a kill between the two renames by which a checkpoint replaces one of the same step."""
    folders = [write(tmp_path / "checkpoints" / step_name(step)) for step in (1, 2)]
    hidden = folders[1].with_name(".step_00000002.replaced")
    folders[1].rename(hidden)
    assert checkpoints_of(tmp_path) == [folders[0], hidden] and find_checkpoint(tmp_path) == hidden
    write(folders[1])
    assert checkpoints_of(tmp_path) == folders and find_checkpoint(tmp_path) == folders[1]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        CheckpointWriter(tmp_path / "c", MODEL, STATE_VALUES) as writer,
    ):
        writer.add("a", torch.zeros(3))
        raise RuntimeError("no space")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "c")
    with pytest.raises(CheckpointError, match="already exists"):
        CheckpointWriter(tmp_path / "c", MODEL, STATE_VALUES)


def test_a_tensor_that_is_not_whole_is_never_published(tmp_path: Path) -> None:
    transaction = Transaction(tmp_path / "c", {"model": MODEL})
    transaction.begin()
    index = Index.from_json(
        {"weight/a": {"shape": [4], "dtype": "float32", "boxes": [[[0], [3], "f", "k"]]}}
    )
    with pytest.raises(CheckpointError, match="3 of 4 elements"):
        transaction.publish(index, {})
    assert not (tmp_path / "c").exists()


WHOLE = [
    [([0, 0], [2, 3]), ([2, 0], [1, 3])],
    [([0, 0], [1, 1]), ([0, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [2, 2])],
    [([0, 0], [3, 1]), ([0, 1], [1, 2]), ([1, 1], [2, 2]), ([0, 0], [0, 3])],
]
NOT_WHOLE = [
    ([([0, 0], [2, 3]), ([1, 0], [1, 3])], "overlap"),
    ([([0, 0], [3, 2]), ([0, 1], [3, 1])], "overlap"),
    ([([0, 0], [1, 3]), ([0, 0], [1, 3]), ([2, 0], [1, 3])], "overlap"),
    ([([0, 0], [3, 3]), ([0, 0], [1, 1])], "10 of 9 elements"),
    ([([0, 0], [2, 3])], "6 of 9 elements"),
]


def index_of(boxes: list[tuple[list[int], list[int]]], shape: list[int]) -> Index:
    named = [[offsets, sizes, "f", f"k{number}"] for number, (offsets, sizes) in enumerate(boxes)]
    return Index.from_json({"weight/a": {"shape": shape, "dtype": "float32", "boxes": named}})


def test_each_element_must_be_stored_exactly_once() -> None:
    """Overlapping boxes may have as many elements as the tensor and still miss some."""
    for boxes in WHOLE:
        index_of(boxes, [3, 3]).check_whole()
    for boxes, said in NOT_WHOLE:
        with pytest.raises(CheckpointError, match=f"weight/a: .*{said}"):
            index_of(boxes, [3, 3]).check_whole()
    index_of([([], [])], []).check_whole()
    with pytest.raises(CheckpointError, match="2 of 1 elements"):
        index_of([([], []), ([], [])], []).check_whole()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_copies_on_more_ranks_than_elements_make_a_whole_tensor(count: int) -> None:
    """ZeRO-0: every data rank holds the whole tensor and writes its share, which may be empty."""
    values = torch.arange(float(count))
    place = Placement((count,), (), None, 0.0, counted=True, name="a")
    packed = []
    for rank in range(5):
        shard = Shard(place, 0, values, {"exp_avg": values})
        boxes = owned_boxes([shard], Grid.at(rank, 1, 5, 1), replicated=True)
        for box in (box for some in boxes.values() for box in some):
            assert torch.equal(box.values, values[box.start : box.start + box.values.numel()])
        slices, starts, counts, _ = rows_of(boxes)
        packed.append((f"f{rank}", Packed.of(slices, starts, counts)))
    index = PartIndex.unpacked(packed)
    assert set(index.entries) == {"weight/a", "exp_avg/a"}
    index.check_whole()


class Carrier:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path(self.path),))  # type: ignore[return-value]


def forge(folder: Path, to: Path, name: str, content: bytes) -> None:
    """The same checkpoint with one file replaced and its checksums recomputed to match."""
    shutil.copytree(folder, to)
    (to / name).write_bytes(content)
    sums = {
        path.relative_to(to): file_digest(path)
        for path in to.rglob("*")
        if path.is_file() and path.name != SUMS
    }
    lines = "".join(f"{digest}  {path}\n" for path, digest in sums.items())
    (to / SUMS).write_text(
        f"{lines}# of the lines above: {hashlib.sha256(lines.encode()).hexdigest()}\n"
    )
    verify(to)


def test_nothing_is_unpickled_and_forgeries_are_refused(tmp_path: Path) -> None:
    """Files with code or wrong values, whose checksums match."""
    folder, mark = write(tmp_path / "c"), tmp_path / "code_ran"
    index, state = (
        json.loads((folder / INDEX).read_text()),
        json.loads((folder / STATE).read_text()),
    )
    weight = index["weight/b"]
    torch.save(Carrier(str(mark)), tmp_path / "code.pt")
    deep = b"[" * 100_000
    tensors = "tensors_00000.safetensors"
    other = save({"weight/a.weight": torch.zeros(5, 7), "weight/b": torch.zeros(2)})
    forgeries = [
        (tensors, pickle.dumps(Carrier(str(mark))), "tensors_00000.safetensors: cannot be read"),
        (tensors, (tmp_path / "code.pt").read_bytes(), "tensors_00000.safetensors: cannot be read"),
        (tensors, other, r"weight/b: F32 \[2\]: must be F32 \[3\] as in the index"),
        (STATE, pickle.dumps(Carrier(str(mark))), "state.json: cannot be read"),
        (STATE, deep, "state.json: cannot be read"),
        (STATE, b"[]", "state.json: must be a JSON object"),
        (STATE, json.dumps({**state, "step": "3"}).encode(), "step: '3': must be an integer"),
        (STATE, json.dumps({**state, "model": None}).encode(), "model: must be"),
        (STATE, json.dumps({**state, "format": 9}).encode(), "format: 9: must be 1"),
        (INDEX, deep, "index.json: cannot be read"),
        (INDEX, json.dumps({"weight/b": 1}).encode(), "is not a checkpoint"),
        (
            INDEX,
            json.dumps({"weight/b": {**weight, "dtype": "object"}}).encode(),
            "is not a checkpoint",
        ),
        (
            INDEX,
            json.dumps({"weight/b": {**weight, "shape": [10**12]}}).encode(),
            "3 of 1000000000000 elements",
        ),
        (
            INDEX,
            json.dumps({"weight/b": {**weight, "boxes": [[[-1], [3], tensors, "k"]]}}).encode(),
            "must be within",
        ),
        (
            INDEX,
            json.dumps({"weight/b": {**weight, "boxes": [[[0], [3], "../x", "k"]]}}).encode(),
            "must be the name of a file",
        ),
    ]
    for number, (name, content, said) in enumerate(forgeries):
        forge(folder, tmp_path / str(number), name, content)
        with pytest.raises(CheckpointError, match=said):
            Checkpoint.open(find_checkpoint(tmp_path / str(number))).read("b")
    assert not mark.exists()


def test_an_index_cannot_point_out_of_its_folder() -> None:
    for file in ("../x", "/etc/passwd", ".hidden", "a/b"):
        with pytest.raises(ValueError, match="must be the name of a file in the folder"):
            Index.from_json(
                {"weight/a": {"shape": [1], "dtype": "float32", "boxes": [[[0], [1], file, "k"]]}}
            )
