"""Files of tensors that are written one at a time (megalite/hub/shards.py), read back by safetensors."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalite.hub.shards import INDEX, Form, bytes_of, plan_shards, write_index, write_shards

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "large": torch.randn(100),
    "none": torch.zeros(0, 4),
    "ids": torch.arange(4).half(),
}
FORMS: dict[str, Form] = {name: (tuple(x.shape), x.dtype) for name, x in TENSORS.items()}


@pytest.mark.parametrize(
    ("most", "files"),
    [
        (10**6, [["a", "b", "large", "none", "ids"]]),
        (435, [["a", "b", "large", "none"], ["ids"]]),
        (100, [["a", "b"], ["large"], ["none", "ids"]]),  # its 400 bytes exceed the size of a file
        (24, [["a"], ["b"], ["large"], ["none", "ids"]]),
    ],
)
def test_files_are_full_but_not_too_large(
    most: int, files: list[list[str]], tmp_path: Path
) -> None:
    shards = plan_shards(FORMS, most)
    assert [list(shard.tensors) for shard in shards] == files
    write_shards(tmp_path, shards, TENSORS.items())
    write_index(tmp_path, shards)
    found: dict[str, Tensor] = {}
    for shard in shards:
        assert (tmp_path / shard.file).stat().st_size == len(shard.header()) + shard.data_bytes
        found |= load_file(tmp_path / shard.file)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert all(found[name].dtype == value.dtype for name, value in TENSORS.items())
    if len(files) == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(map(bytes_of, FORMS.values()))}
    assert index["weight_map"]["ids"] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).t()
    write_shards(tmp_path, plan_shards({"x": ((3, 2), torch.float32)}, 100), [("x", turned)])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], turned)


def test_another_order_or_shape_is_not_written(tmp_path: Path) -> None:
    def others() -> Iterator[tuple[str, Tensor]]:
        yield "a", TENSORS["a"].t()

    with pytest.raises(AssertionError, match="a"):
        write_shards(tmp_path, plan_shards(FORMS, 10**6), others())
