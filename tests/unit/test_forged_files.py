"""Hundreds of forged checkpoints, model folders, tokenizers, corpora and lines of text: each is valid or gives a
one-line error. A checkpoint's SHA256SUMS always matches: whoever forges a checkpoint also forges that."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from megalite.checkpoint.files import Checkpoint, find_checkpoint
from megalite.checkpoint.inspect import described
from megalite.data.chat_encoder import ChatEncoder
from megalite.data.chat_forms import NotChat
from megalite.data.documents import Bad, InputPosition, TextChunk, parse_objects
from megalite.data.indexed import files_of, marks_prefix
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inspection import Show, inspect
from megalite.data.loader import TrainData, ValidData, check_data
from megalite.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megalite.errors import DataError
from megalite.hub.carried import stop_ids_of, tokenizer_of
from megalite.hub.export_folder import export_hf
from megalite.hub.hf_folder import HFFolder
from megalite.hub.import_folder import import_hf
from megalite.model.families import read_spec
from tests.byte_model import save_byte_model
from tests.fuzzing import EXAMPLES, changed, damaged, holds
from tests.unit.data.corpora import data_section, write_corpus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_byte_model(tmp_path_factory.mktemp("model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return folder


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "imported"
    import_hf(model, folder, verify=False)
    return folder


def resum(folder: Path) -> None:
    """Recomputes SHA256SUMS."""
    names = sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.name != "SHA256SUMS"
    )
    lines = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    )
    own = hashlib.sha256(lines.encode()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{lines}# of the lines above: {own}\n")


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(
    "name", ["index.json", "state.json", "hugging_face/generation_config.json"]
)
def test_a_forged_json_of_a_checkpoint(
    checkpoint: Path, tmp_path: Path, name: str, examples: int
) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(checkpoint, forged)
    good = json.loads((checkpoint / name).read_text())
    if name == "index.json":  # few tensors, so that each is changed sometimes
        good = {key: good[key] for key in list(good)[:4]}

    def read(value: Any) -> None:
        (forged / name).write_text(json.dumps(value))
        resum(forged)
        opened = Checkpoint.open(find_checkpoint(forged))
        list(described(opened, tensors=True))
        for one in opened.names:
            opened.read(one)
        read_spec(opened.model)
        stop_ids_of(opened)
        tokenizer_of(opened)

    holds(read, changed(good), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["tensors_00000.safetensors", "SHA256SUMS", "index.json"])
def test_a_damaged_file_of_a_checkpoint(
    checkpoint: Path, tmp_path: Path, name: str, examples: int
) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(checkpoint, forged)

    def read(content: bytes) -> None:
        (forged / name).write_bytes(content)
        if name != "SHA256SUMS":
            resum(forged)
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)
        export_hf(forged, tmp_path / "exported", verify=False)

    holds(read, damaged((checkpoint / name).read_bytes()), examples // 2)


def _header(content: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_forged_header_of_tensors(
    model: Path, checkpoint: Path, tmp_path: Path, examples: int
) -> None:
    """In checkpoints and in Hugging Face folders."""
    for source, name in ((model, "model.safetensors"), (checkpoint, "tensors_00000.safetensors")):
        forged = tmp_path / name
        shutil.copytree(source, forged)
        header, data = _header((source / name).read_bytes())
        names = list(header)[:3]

        def read(
            part: Any,
            header: Any = header,
            data: bytes = data,
            forged: Path = forged,
            name: str = name,
        ) -> None:
            whole = {**header, **part} if isinstance(part, dict) else part
            (forged / name).write_bytes(_with_header(whole, data))
            if name == "model.safetensors":
                folder: Any = HFFolder(forged)
            else:
                resum(forged)
                folder = Checkpoint.open(find_checkpoint(forged))
            for one in folder.names:
                folder.read(one)

        holds(read, changed({key: header[key] for key in names}), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_of_tensors(model: Path, tmp_path: Path, name: str, examples: int) -> None:
    import torch
    from safetensors.torch import load_file

    forged = tmp_path / "forged"
    shutil.copytree(model, forged)
    if name.endswith(".bin"):
        torch.save(load_file(forged / "model.safetensors"), forged / name)
        (forged / "model.safetensors").unlink()
    whole = (forged / name).read_bytes()

    def read(content: bytes) -> None:
        (forged / name).write_bytes(content)
        folder = HFFolder(forged)
        for one in folder.names:
            folder.read(one)

    holds(
        read,
        damaged(whole[:4000]).map(lambda start: start + whole[4000:]) | damaged(whole),
        examples,
    )


@pytest.mark.parametrize(
    "value", [["x"], {"a": 1}, 3, None, {"transformer.wte.weight": "x"}, {"x": [1]}, {1: 2}]
)
def test_a_torch_file_that_holds_no_tensors(model: Path, tmp_path: Path, value: Any) -> None:
    import torch

    forged = tmp_path / "forged"
    shutil.copytree(model, forged)
    (forged / "model.safetensors").unlink()
    torch.save(value, forged / "pytorch_model.bin")
    holds(lambda _: HFFolder(forged), st.none(), 1)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_forged_index_of_shards(model: Path, tmp_path: Path, examples: int) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(model, forged)
    names = list(HFFolder(model).shapes)
    good = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names[:3], "model.safetensors"),
    }

    def read(value: Any) -> None:
        (forged / "model.safetensors.index.json").write_text(json.dumps(value))
        HFFolder(forged)

    holds(read, changed(good), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_forged_tokenizer(model: Path, tmp_path: Path, name: str, examples: int) -> None:
    forged = tmp_path / "forged"
    forged.mkdir()
    for path in model.glob("*token*.json"):
        shutil.copy(path, forged)
    good = (
        json.loads((model / name).read_text()) if (model / name).exists() else {"eos_token": "</s>"}
    )
    if "model" in good:
        good["model"]["vocab"] = dict(list(good["model"]["vocab"].items())[:6])

    def read(value: Any) -> None:
        (forged / name).write_text(json.dumps(value))
        tokenizer = load_tokenizer(forged)
        tokenizer.decode(tokenizer.encode("one two"))
        if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.inner.is_fast:
            encoder = ChatEncoder(tokenizer, str(forged))
            encoder.encode({"prompt": "a ", "completion": "b"})

    holds(read, changed(good), examples, NotChat)


def test_an_id_that_would_fill_the_memory(model: Path, tmp_path: Path) -> None:
    for path in model.glob("*token*.json"):
        shutil.copy(path, tmp_path)
    whole = json.loads((model / "tokenizer.json").read_text())
    whole["model"]["vocab"]["!"] = 2**31 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(
        DataError, match="token '!' has the id 2147483647: must be at most 10000000"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(
    "name", ["corpus.idx", "corpus.bin", "corpus.mask.idx", "corpus.mask.bin", "corpus.sha256"]
)
def test_a_damaged_corpus(
    tmp_path: Path, name: str, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prefix = tmp_path / "corpus"
    documents = write_corpus(prefix, 12, vocabulary=100)
    with IndexedWriter(marks_prefix(prefix), np.uint8) as writer:
        for document in documents:
            writer.add_document(document % 2)
    if name == "corpus.sha256":
        sums = (
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
            for path in files_of(prefix)
        )
        (tmp_path / name).write_text("".join(sums))
    whole = (tmp_path / name).read_bytes()
    marked: dict[str, Any] = {"loss": "marked", "valid": [str(prefix)]}
    sections = [data_section([prefix], 16, samples="windows", **marked)]
    for kind in ("packed", "padded"):
        sections.append(data_section([prefix], 16, samples=kind, reset_attention=True, **marked))
    sections += [data_section([prefix], 16, loss="all", order="megatron", megatron_samples=20)]

    def read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        list(inspect([str(prefix)], Show(verify=True, vocabulary_size=100)))
        for section in sections:
            check_data(section, 100)
            train = TrainData(section, 1, 100)
            train.batch(range(12))
            if section.valid:
                valid = ValidData(section, 100)
                valid.batch(range(min(4, valid.num_samples)))

    read(whole)
    holds(read, damaged(whole), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_forged_lines_of_conversations(model: Path, examples: int) -> None:
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    tokenizer.inner.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    )
    encoder = ChatEncoder(tokenizer, str(model))
    good = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            ],
            "tools": "[{}]",
        },
        {"instruction": "a", "input": "b", "output": "c", "system": "d"},
    ]

    def read(line: bytes) -> None:
        for _, found in parse_objects(
            TextChunk("jsonl", InputPosition(), InputPosition(), line, 0)
        ):
            if not isinstance(found, Bad):
                encoder.encode(found)

    values = st.one_of([changed(value) for value in good])
    lines = values.map(lambda value: json.dumps(value).encode())
    holds(
        read,
        lines | damaged(json.dumps(good[0]).encode()) | st.binary(max_size=20),
        examples * 3,
        NotChat,
    )


TEMPLATES = [
    "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ messages.x.y }}", "{{ x() }}", "{% for", "{{ '%d' % messages }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(999999) | list }}", "{{ [] | first + 1 }}",
    "{{ raise_exception('no') }}", "{{ 'x' * 'y' }}", "{{ messages | tojson | int + 'a' }}", "{{ {} | dictsort(1) }}",
    "{% generation %}{{ 1 / 0 }}{% endgeneration %}", "{% include 'x' %}", "{{ messages.__class__ }}",
    "{{ ''.join(1) }}", "{{ '\\ud800' }}", "{% generation %}{% endgeneration %}",
    "{{ strftime_now(3) }}", "{{ messages[0].content.x }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_may_raise_anything(model: Path, template: str) -> None:
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    tokenizer.inner.chat_template = template
    encoder = ChatEncoder(tokenizer, str(model))
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    holds(lambda _: encoder.encode(line), st.none(), 1, NotChat)
