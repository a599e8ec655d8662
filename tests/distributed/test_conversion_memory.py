"""Conversions need as much memory as docs/hugging_face.md says, however large the model."""

import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.ranks import REPOSITORY

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
MIB = 1 << 20


def peak_bytes(*command: str) -> int:
    """Peak private memory of one of our programs, without mapped files, which the kernel may drop."""
    process = psutil.Popen(
        [sys.executable, *command], cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}
    )
    most = 0
    while process.poll() is None:
        try:
            memory = process.memory_info()
            most = max(most, memory.rss - memory.shared)
        except psutil.Error:
            break
        time.sleep(0.005)
    assert process.wait() == 0
    return most


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_conversions_do_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = {}
    for layers in (8, 24):
        hf, checkpoint, out = (tmp_path / f"{name}{layers}" for name in ("hf", "checkpoint", "out"))
        config = AutoConfig.for_model("llama", vocab_size=32000, num_hidden_layers=layers, **SIZES)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
            hf, max_shard_size="200MB"
        )
        arguments = ("--model", str(hf), "--output", str(checkpoint), "--no-verify")
        peaks["import", layers] = peak_bytes("tools/import_hf.py", *arguments)
        arguments = ("--checkpoint", str(checkpoint), "--output", str(out), "--no-verify")
        peaks["export", layers] = peak_bytes("tools/export_hf.py", *arguments)
    print({key: f"{peak / MIB:.0f} MiB" for key, peak in peaks.items()})
    for kind in ("import", "export"):
        assert peaks[kind, 24] < peaks[kind, 8] + 64 * MIB, peaks
        assert peaks[kind, 24] < 800 * MIB, peaks
