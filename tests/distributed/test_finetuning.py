"""Epochs, the best checkpoint and early stopping: all ranks of a run decide the same, also after a restart, and
ds_configs/finetune.json uses all of it on a Hugging Face folder."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import megalite
from megalite.checkpoint.files import (
    Checkpoint,
    best_checkpoint,
    checkpoints_of,
    find_checkpoint,
    named_best,
)
from megalite.commands import chat, export_hf
from megalite.data.indexed import IndexedCorpus
from megalite.data.preprocessing import preprocess
from megalite.errors import CheckpointError
from megalite.training import pretraining as program
from megalite.training.evaluation import Validation
from megalite.training.loop import Run
from tests.byte_model import save_byte_model
from tests.distributed.test_evaluate import evaluated
from tests.ranks import run_ranks
from tests.training_runs import VOCABULARY, document, nothing, rows, train
from tests.unit.data.corpora import write_corpus

LOSSES = [5.0, 4.0, 3.0, 2.99, 3.5, 3.2, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0]
EARLY = {"patience": 3, "min_delta": 0.05}


@contextlib.contextmanager
def with_losses(rank: int, losses: list[float]) -> Iterator[None]:
    """The evaluation after each step returns the given loss."""

    evaluate, step = Run._evaluate_in_time, 0

    def evaluating(run: Run) -> None:
        nonlocal step
        step = run.position.step
        evaluate(run)

    def found(*args: Any) -> torch.Tensor:
        return torch.tensor([losses[step - 1], 1.0], dtype=torch.float64)

    with (
        mock.patch.object(Run, "_evaluate_in_time", evaluating),
        mock.patch.object(Validation, "scores", found),
    ):
        yield


def watched(folder: Path, run: str, layout: dict[str, int], **keys: Any) -> dict[str, Any]:
    """A run with a separate validation corpus, evaluated after each step."""
    if not (folder / "valid.idx").exists():
        write_corpus(folder / "valid", 30, vocabulary=VOCABULARY, seed=1)
    keys = {
        "eval_interval": 1,
        "keep_checkpoints": 1,
        "keep_best": True,
        "early_stop": EARLY,
    } | keys
    made = document(folder, run, layout, train=keys)
    made["megalite"]["data"]["valid"] = [str(folder / "valid")]
    return made


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints_of(run_dir)]


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["valid_loss"]) for row in lines if "valid_loss" in row]


def test_a_run_stops_keeps_its_best_and_does_so_after_a_restart(tmp_path: Path) -> None:
    layout = {"pipe": 2, "zero": 2}
    planted = functools.partial(with_losses, losses=LOSSES)
    whole = watched(tmp_path, "whole", layout, steps=12)
    # A gain of 0.01 is the best so far, but too small to count: the run waits for steps 4, 5 and 6.
    first = watched(tmp_path, "parted", layout, steps=5)
    rest = watched(tmp_path, "parted", layout, steps=12)
    runs = [(keys, planted) for keys in (whole, first, rest, rest)]
    assert run_ranks(2, train, runs) == [[0, 0, 0, 0]] * 2
    for run in ("whole", "parted"):
        folder = tmp_path / run
        assert [step for step, _ in evaluations(folder)] == [1, 2, 3, 4, 5, 6]
        assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
        assert names(folder) == ["step_00000004", "step_00000006"]
        assert named_best(folder) == "step_00000004"
        state = Checkpoint.open(find_checkpoint(folder)).state
        assert state["best"] == {"loss": 2.99, "step": 4, "bar": 3.0, "waited": 3}
        history = [json.loads(line) for line in (folder / "history.jsonl").open()]
        assert history[-1]["reason"] == "stopped early"
    one, two = (Checkpoint.open(find_checkpoint(tmp_path / run)) for run in ("whole", "parted"))
    assert all(one.read(name).equal(two.read(name)) for name in one.names)
    # With more patience the run continues; `best` names the new best one, and the older one is removed.
    more = watched(tmp_path, "whole", layout, steps=12, early_stop={"patience": 4})
    assert run_ranks(2, train, [(more, planted)]) == [[0]] * 2
    assert [step for step, _ in evaluations(tmp_path / "whole")] == list(range(1, 12))
    assert names(tmp_path / "whole") == ["step_00000007", "step_00000011"]
    assert named_best(tmp_path / "whole") == "step_00000007"


def test_a_run_without_them_goes_to_its_last_step(tmp_path: Path) -> None:
    planted = functools.partial(with_losses, losses=LOSSES)
    made = watched(tmp_path, "run", {}, steps=8, keep_best=False, early_stop=None)
    assert run_ranks(1, train, [(made, planted)]) == [[0]]
    assert names(tmp_path / "run") == ["step_00000008"] and named_best(tmp_path / "run") is None
    with pytest.raises(
        CheckpointError, match=r"--best: .*run: has no checkpoints/best: must be a run with"
    ):
        best_checkpoint(tmp_path / "run")


def test_losses_that_are_not_finite_are_no_gain(tmp_path: Path) -> None:
    losses = [float("nan"), 4.0, float("inf"), float("nan"), 5.0]
    planted = functools.partial(with_losses, losses=losses)
    made = watched(tmp_path, "run", {}, steps=9)
    assert run_ranks(1, train, [(made, planted)]) == [[0]]
    assert named_best(tmp_path / "run") == "step_00000002"
    assert names(tmp_path / "run") == ["step_00000002", "step_00000005"]


def test_a_damaged_best_checkpoint_is_no_longer_named(tmp_path: Path) -> None:
    planted = functools.partial(with_losses, losses=LOSSES)
    keys = {"early_stop": None, "keep_checkpoints": 0, "checkpoint_interval": 1}
    first = watched(tmp_path, "run", {}, steps=4, **keys)
    assert run_ranks(1, train, [(first, planted)]) == [[0]]
    assert named_best(tmp_path / "run") == "step_00000004"
    tensors = next((tmp_path / "run/checkpoints/step_00000004").glob("tensors*"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    rest = watched(tmp_path, "run", {}, steps=3, **keys)
    assert run_ranks(1, train, [(rest, planted)]) == [[0]]
    assert named_best(tmp_path / "run") == "step_00000003"


def test_real_losses_stop_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    """The model memorizes random tokens, and the loss on others rises."""
    early = {"patience": 2}
    keys = {"steps": 60, "eval_interval": 3, "eval_steps": 99, "early_stop": early}
    made = watched(tmp_path, "run", {"zero": 1}, **keys)
    assert run_ranks(2, train, [(made, nothing)]) == [[0]] * 2
    found = evaluations(tmp_path / "run")
    best = min(found, key=lambda pair: pair[1])
    assert len(found) == found.index(best) + 3 and found[-1][0] < 60
    assert named_best(tmp_path / "run") == f"step_{best[0]:08d}"
    assert names(tmp_path / "run") == [f"step_{step:08d}" for step in (best[0], found[-1][0])]
    words = ["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "valid")]
    for more, loss in ((["--best"], best[1]), ([], found[-1][1])):
        ((line,),) = run_ranks(1, evaluated, [*words, *more], init=False)
        assert line["loss"] == pytest.approx(loss, rel=1e-5)


def tuned(rank: int, world_size: int, words: list[str]) -> int:
    return program.main(words)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def chats(folder: Path, name: str, first: int, count: int) -> None:
    """Conversations in which the answer is the question's letter twice, in three forms in turn."""
    lines: list[dict[str, Any]] = []
    for i in range(first, first + count):
        asked, answer = chr(97 + i % 26), 2 * chr(97 + i % 26)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        forms: list[dict[str, Any]] = [
            {"messages": said},
            {"conversations": turns},
            {"instruction": asked, "input": "", "output": answer},
        ]
        lines.append(forms[i % 3])
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = [str(folder / f"{name}.jsonl")]
    counts = preprocess(inputs, folder / "models/base", folder / "data" / name, chat=True)
    assert (counts.documents, counts.bad) == (count, 0)


def test_the_example_tunes_a_hugging_face_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_byte_model(tmp_path / "models/base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    (tmp_path / "data").mkdir()
    chats(tmp_path, "talks", 0, 40)
    chats(tmp_path, "talks-valid", 7, 12)
    text = Path("ds_configs/finetune.json").read_text()
    for folder in ("models", "data", "runs"):
        text = text.replace(f'"{folder}/', f'"{tmp_path}/{folder}/')
    (tmp_path / "config.json").write_text(text)
    words = ["--deepspeed_config", str(tmp_path / "config.json"),
             "megalite.data.sequence_length=60", "optimizer.params.lr=1e-2",
             "scheduler.params.warmup_steps=1", "megalite.train.eval_interval=2",
             "megalite.train.tensorboard=false", "megalite.train.early_stop.patience=9"]  # fmt: skip
    assert run_ranks(2, tuned, words, init=False) == [0, 0]
    run = tmp_path / "runs/finetune"
    # All conversations have the same length and are packed into samples; three epochs in steps of 16 samples.
    (length,) = set(IndexedCorpus(tmp_path / "data/talks").sizes.tolist())
    steps = -(-3 * -(-40 // (60 // (length - 1))) // 16)
    assert json.loads((run / "config.json").read_text())["megalite"]["train"]["steps"] == steps
    assert [step for step, _ in evaluations(run)] == [2, steps]
    assert run_ranks(2, tuned, words, init=False) == [0, 0]  # and it is over
    assert [step for step, _ in evaluations(run)] == [2, steps]
    best = min(evaluations(run), key=lambda pair: pair[1])[0]
    assert named_best(run) == f"step_{best:08d}"
    out = tmp_path / "out"
    assert export_hf.main(["--checkpoint", str(run), "--best", "--output", str(out)]) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, out)
    )
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    found = Checkpoint.open(find_checkpoint(run / "checkpoints/best"))
    assert (
        found.folder.name == megalite.load(run / "checkpoints/best").folder.name == named_best(run)
    )
    assert found.state["step"] == best
    capsys.readouterr()
    words = ["--best", "--prompt", "a", "--temperature", "0", "--max-new-tokens", "5"]
    assert chat.main([str(run), *words]) == 0
    assert capsys.readouterr().out == megalite.load(out).chat("a", 5) + "\n"
