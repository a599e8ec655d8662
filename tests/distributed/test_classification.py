"""The classification example of docs/finetuning.md, on real glosses of WordNet: what launcher/classify.sh does."""

import json
import subprocess
from pathlib import Path

import pytest

from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer_training import train_tokenizer
from tests.distributed.test_evaluate import evaluated
from tests.distributed.test_pretrained import tuned
from tests.programs import run_program
from tests.ranks import run_ranks

GLOSSES = """  1 This software and database is being provided to you
00017222 03 n 02 plant 0 flora 0 001 @ 00004475 n 0000 | (botany) a living organism lacking the power of locomotion
00015388 05 n 02 animal 0 fauna 1 000 | a living organism; "an example | of it"
00021265 13 n 01 food 0 000 | any substance that can be metabolized by an animal
"""


def collect(wordnet: Path, output: Path) -> None:
    words = ["--wordnet", str(wordnet), "--output", str(output)]
    assert run_program("tools/collect_glosses.py", *words).returncode == 0


def test_a_gloss_is_the_prompt_and_its_topic_the_completion(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(GLOSSES)
    collect(tmp_path, tmp_path / "out")
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "valid.jsonl").read_text().splitlines()
    ]
    assert lines == [
        {"prompt": "a living organism\nTopic:", "completion": " animal"},
        {
            "prompt": "any substance that can be metabolized by an animal\nTopic:",
            "completion": " food",
        },
    ]
    assert (
        tmp_path / "out" / "train.jsonl"
    ).read_text() == ""  # the first of every ten is for validation


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_topics_are_told_apart(tmp_path: Path) -> None:
    for command in (
        ["apt-get", "download", "wordnet-base"],
        ["sh", "-c", "dpkg-deb -x wordnet-base_*.deb wordnet"],
    ):
        if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0:
            pytest.skip("Debian's wordnet-base cannot be had here")
    collect(tmp_path / "wordnet/usr/share/wordnet", tmp_path)
    train_tokenizer([str(tmp_path / "train.jsonl")], 4096, "bpe", tmp_path / "tokenizer", "prompt")
    for part in ("train", "valid"):
        preprocess(
            [str(tmp_path / f"{part}.jsonl")],
            str(tmp_path / "tokenizer"),
            str(tmp_path / part),
            chat=True,
        )
    text = Path("ds_configs/classify.json").read_text()
    text = text.replace("runs/classify-data", str(tmp_path)).replace(
        "runs/classify", str(tmp_path / "run")
    )
    (tmp_path / "config.json").write_text(text)
    assert run_ranks(2, tuned, str(tmp_path / "config.json"), init=False, timeout_seconds=2000) == [
        0,
        0,
    ]
    arguments = ["--checkpoint", str(tmp_path / "run"), "--labelled", str(tmp_path / "valid.jsonl")]
    arguments += ["--micro-batch-size", "64", "megalite.parallel.tensor=2"]
    (found,) = run_ranks(2, evaluated, arguments, init=False, timeout_seconds=1000)[0]
    print(found)
    assert found["lines"] == 2000 and found["commonest"] == 0.125
    assert found["accuracy"] > 0.7
