"""Encoders from end to end: what is refused, and masked language modelling on layouts and over restarts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import FAMILY_CONFIGS, hf_model
from tests.ranks import REPOSITORY


@pytest.mark.parametrize(
    ("program", "asked", "use"),
    [
        ("generate.py", ("--prompt", "a"), "generation"),
        ("evaluate.py", ("--labelled", "labels.jsonl"), "--labelled"),
        ("evaluate.py", ("--tasks", "arc_easy"), "--tasks"),
    ],
)
def test_what_needs_a_decoder_refuses_an_encoder_in_a_line(
    program: str, asked: tuple[str, ...], use: str, tmp_path: Path
) -> None:
    hf_model(FAMILY_CONFIGS["bert"]).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, f"launcher/{program}", "--checkpoint", str(tmp_path), *asked],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    rule = f"--checkpoint: {tmp_path}: a bert model is an encoder: {use} needs a decoder, such as llama"
    assert done.returncode == 2 and rule in done.stderr, done.stderr
