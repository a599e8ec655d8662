"""Files of other programs give a one-line error that names their format, and the suggested remedies work."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megalite import other_formats
from megalite.config import load_config
from megalite.data.indexed import IndexedCorpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import CheckpointError, ConfigError, DataError, UserError
from megalite.hub.export_folder import export_hf
from megalite.hub.import_folder import import_hf
from megalite.hub.sources import resolve_weights
from megalite.model.families import read_spec

HUB = "does not exist; if it is a name on the Hugging Face Hub, download it first"


def make(folder: Path, *names: str) -> Path:
    """Makes a folder of empty files with these names."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


WEIGHTS = {
    "Megatron-DeepSpeed": (["latest", "global_step10/mp_rank_00_model_states.pt"], "DeepSpeed's format"),
    "GPT-NeoX": (["layer_00-model_00-model_states.pt"], "DeepSpeed's format"),
    "ZeRO": (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed's format"),
    "Megatron-LM": (["iter_0000100/mp_rank_00/model_optim_rng.pt"], "is a Megatron-LM checkpoint"),
    "Megatron-LM, distributed": (["latest_checkpointed_iteration.txt"], "is a Megatron-LM checkpoint"),
    "nanotron": (["checkpoint_metadata.json", "model/x"], "is a nanotron checkpoint"),
    "peft": (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_checkpoints_of_other_trainers_are_named(kind: str, tmp_path: Path) -> None:
    names, line = WEIGHTS[kind]
    folder = make(tmp_path / "x", *names)
    for use in (
        lambda: resolve_weights(folder),
        lambda: import_hf(folder, tmp_path / "y"),
        lambda: export_hf(folder, tmp_path / "y"),
    ):
        with pytest.raises(CheckpointError) as error:
            use()
        assert str(error.value).startswith(
            f"{folder}: {line}".replace("DeepSpeed's", "is a checkpoint in DeepSpeed's")
        )
    assert not (tmp_path / "y").exists()


def test_a_trainers_output_folder_names_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", "checkpoint-90/config.json", "checkpoint-500/config.json")
    with pytest.raises(CheckpointError, match=r"such as .*checkpoint-500$"):
        resolve_weights(folder)
    with pytest.raises(CheckpointError, match="is a file: give the folder that contains it"):
        resolve_weights(folder / "checkpoint-90/config.json")


def test_names_on_the_hub_are_not_fetched(tmp_path: Path) -> None:
    name = "meta-llama/Llama-3.2-1B"
    for use in (resolve_weights, load_tokenizer, read_spec):
        with pytest.raises(UserError) as error:
            use(name)  # type: ignore[operator]
        assert f"{name}: {HUB}" in str(error.value)
    assert other_formats.hub_name(tmp_path / "a") == "" == other_formats.hub_name("megalite/none")


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: i for i, token in enumerate(["<|endoftext|>", *alphabet, "ab"])}, [("a", "b")]


def test_a_tokenizer_file_of_neox_works_once_it_is_where_the_line_says(tmp_path: Path) -> None:
    vocabulary, merges = byte_pairs()
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.save(str(tmp_path / "20B_tokenizer.json"))
    with pytest.raises(DataError, match="is one file of a tokenizer .*as tokenizer.json, with a"):
        load_tokenizer(tmp_path / "20B_tokenizer.json")
    (tmp_path / "t").mkdir()
    (tmp_path / "20B_tokenizer.json").rename(tmp_path / "t/tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(settings))
    found = load_tokenizer(tmp_path / "t")
    assert found.encode("ab")[0] == vocabulary["ab"] and found.eod_id == 0


def test_vocabulary_and_merges_work_once_the_settings_say_what_they_are(tmp_path: Path) -> None:
    vocabulary, merges = byte_pairs()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    with pytest.raises(DataError, match="is one of the two files of GPT-2's tokenizer"):
        load_tokenizer(tmp_path / "merges.txt")
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path)
    assert "contains vocab.json and merges.txt but no tokenizer_config.json" in str(error.value)
    said = '{"tokenizer_class": "GPT2Tokenizer"}'
    assert said in str(error.value)
    (tmp_path / "tokenizer_config.json").write_text(said)
    found = load_tokenizer(tmp_path)
    assert found.encode("ab") == [vocabulary["ab"]] and found.eod_id == 0


def test_a_vocabulary_of_bert_is_named(tmp_path: Path) -> None:
    (tmp_path / "bert-vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n")
    with pytest.raises(DataError, match="is the vocabulary of a BERT tokenizer"):
        load_tokenizer(tmp_path / "bert-vocab.txt")
    (tmp_path / "bert-vocab.txt").rename(tmp_path / "vocab.txt")
    with pytest.raises(DataError, match="for BertTokenizer, write"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_tokenizer(tmp_path).encode("a") == [5]


def test_other_ways_to_name_a_corpus_are_explained(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c_text_document", "uint16") as writer:
        writer.add_document([1, 2, 3])
    (tmp_path / "my.txt").write_text("abc")
    prefix = tmp_path / "c_text_document"
    for given, line in (
        (tmp_path / "c", f"no such corpus; did you mean {prefix}?"),
        (
            f"{prefix}.bin",
            f"is one of a corpus's two files: give the prefix of both, {prefix}",
        ),
        (
            f"{prefix}.idx",
            f"is one of a corpus's two files: give the prefix of both, {prefix}",
        ),
        (tmp_path / "my.txt", "is a text: tokenize it (megalite preprocess), or train on it"),
        (
            tmp_path,
            f"is a folder: give the prefix of a corpus's .bin and .idx files, such as {prefix}",
        ),
        (tmp_path / "none", "cannot be read: No such file"),
    ):
        with pytest.raises(DataError) as error:
            IndexedCorpus(given)
        assert line in str(error.value)
    assert IndexedCorpus(prefix).num_tokens == 3


def test_a_config_in_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "125M.yml").write_text('{"num_layers": 12}')
    with pytest.raises(ConfigError, match="125M.yml: is YAML: must be JSON"):
        load_config(tmp_path / "125M.yml")
