"""Hundreds of forged JSONs, overrides, environments and command lines: each gives a valid run or a one-line error."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from megalite.config import Config
from megalite.config.reading import read_json
from megalite.model.families import FAMILIES, model_dict, read_spec
from megalite.ranks.place import place
from megalite.supervisor.hostfile import read_hostfile
from megalite.training.pretraining import main
from tests.families import FAMILY_CONFIGS
from tests.fuzzing import EXAMPLES, anything, changed, damaged, holds, odd, paths_of
from tests.unit.data.corpora import write_corpus

DOCUMENT: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "wsd", "params": {"warmup_steps": 2, "decay_steps": 2}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
    "megalite": {
        "model": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 131, "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
        "parallel": {"tensor": 1, "pipe": 1, "sequence": False},
        "data": {
            "sequence_length": 16, "train": ["CORPUS", {"path": "CORPUS", "weight": 0.3, "split": [0.0, 0.9]}],
            "valid": ["CORPUS"],
        },
        "train": {
            "steps": 10, "seed": 3, "run_dir": "RUN", "activation_checkpointing": "none",
            "batch_ramp": {"start": 4, "increment": 4, "samples": 20},
            "parameter_groups": [{"match": "layers.*", "lr_ratio": 0.5}], "init": {"std": 0.1},
            "limits": {"step_seconds": 5.0}, "faults": {"not_finite": "skip", "spike_factor": 3.0},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the cache of checked corpora."""
    made = tmp_path_factory.mktemp("forged")
    write_corpus(made / "corpus", 60, vocabulary=131)
    os.environ["XDG_CACHE_HOME"] = str(made)
    return made


def placed(document: Any, folder: Path) -> str:
    return (
        json.dumps(document)
        .replace("CORPUS", str(folder / "corpus"))
        .replace("RUN", str(folder / "run"))
    )


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_forged_config(folder: Path, examples: int, capsys: Any) -> None:
    """Read as by `--check`, with corpora and memory."""

    def read(document: Any) -> None:
        (folder / "config.json").write_text(placed(document, folder))
        assert (
            main(
                ["--deepspeed_config", str(folder / "config.json"), "--check", "--world-size", "2"]
            )
            == 0
        )

    read(DOCUMENT)
    capsys.readouterr()
    holds(read, changed(DOCUMENT), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_file_that_is_hardly_json(folder: Path, examples: int) -> None:
    def read(content: bytes) -> None:
        (folder / "bytes.json").write_bytes(content)
        Config.from_dict(read_json(folder / "bytes.json")).resolve(1)

    holds(read, damaged(placed(DOCUMENT, folder).encode()) | st.binary(max_size=30), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_forged_overrides(folder: Path, examples: int) -> None:
    (folder / "config.json").write_text(placed(DOCUMENT, folder))
    keys = st.sampled_from(
        [".".join(map(str, path)) for path in paths_of(DOCUMENT) if path]
    ) | st.text(max_size=9)
    values = st.text(max_size=9) | anything.map(json.dumps)
    values |= st.sampled_from(["[" * 2000, "9" * 5000, "\udcff", "1e999"])
    override = st.builds("{}={}".format, keys, values) | st.text(max_size=12)

    def read(overrides: list[str]) -> None:
        words = [word for word in overrides if not word.startswith("-")]
        if "\0" in "".join(words):  # the kernel does not allow NUL bytes
            return
        main(["--deepspeed_config", str(folder / "config.json"), "--check", *words])

    holds(read, st.lists(override, min_size=1, max_size=3), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forged_model(tmp_path: Path, family: str, examples: int) -> None:
    """Every field of the family's config, inline and in a folder."""
    from transformers import AutoConfig

    good = AutoConfig.for_model(family).to_dict()
    good |= next(config for config in FAMILY_CONFIGS.values() if config["model_type"] == family)
    fields = st.dictionaries(st.sampled_from(sorted(good)), odd | anything, min_size=1, max_size=2)

    def read(change: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        read_spec(model_dict(str(tmp_path)))

    holds(read, fields, max(20, examples // 2))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_forged_environment(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"]
    names += [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    names += [
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_TASKS_PER_NODE",
    ]
    values = st.sampled_from(
        ["", "0", "1", "2", "-1", "x", "9" * 5000, "4(x2),3", "1(x999999999)", "(x", "٣"]
    )
    values |= st.text(max_size=4)

    def read(environment: dict[str, str]) -> None:
        monkeypatch.setattr(os, "environ", dict(environment))
        here = place()
        assert (
            0 <= here.rank < here.world_size
            and 0 <= here.local_rank < here.local_size <= here.world_size
        )

    holds(read, st.dictionaries(st.sampled_from(names), values), examples * 5)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_forged_hostfile(tmp_path: Path, examples: int) -> None:
    def read(content: bytes) -> None:
        (tmp_path / "hostfile").write_bytes(content)
        assert read_hostfile(str(tmp_path / "hostfile"))

    holds(
        read,
        damaged(b"# all\nworker-1 slots=8\n10.0.0.2\tslots=4 # half\n") | st.binary(max_size=40),
        examples * 5,
    )
