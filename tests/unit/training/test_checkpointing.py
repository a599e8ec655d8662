"""When a run saves, its message about a failed save, and the saved state (training/checkpointing.py)."""

from types import SimpleNamespace
from typing import Any

import pytest

from megalite.checkpoint.storage import SaveFailed
from megalite.data.best import Best
from megalite.data.position import Position
from megalite.errors import TrainingError
from megalite.training import checkpointing
from megalite.training.checkpointing import Checkpoints


class Saver:
    """Records what is saved. error: raised by the save in progress."""

    def __init__(self) -> None:
        self.saved: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None
        self.lines = ["old.damaged: removed"]
        self.copy = SimpleNamespace(made="an event")

    def wait(self) -> None:
        if (error := self.error) is not None:
            self.error = None
            raise error

    def save(self, *given: Any) -> None:
        self.saved.append(given)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(checkpointing, "owned_boxes", lambda shards, grid, replicated: replicated)
    axis = SimpleNamespace(size=1)
    names = ("pipe", "data", "context", "expert", "tensor")
    engine = SimpleNamespace(
        shards=list, grid=SimpleNamespace(**dict.fromkeys(names, axis)),
        loss_scale_state=lambda: {"cur_scale": 8}, router_bias=None, update_waits_for=None,
    )  # fmt: skip
    made: Any = Checkpoints.__new__(Checkpoints)
    made.engine, made.saver, made.lines = engine, Saver(), []
    made.health = SimpleNamespace(check_sound=lambda boxes, step: None, in_a_row=2, faulty_step=4)
    made.log, made.saved_step, made.fingerprint, made.model = made.lines.append, 5, {}, {}
    made.config = SimpleNamespace(
        zero_stage=0, precision="fp32", optimizer=SimpleNamespace(type="AdamW"),
        train=SimpleNamespace(keep_best=True, seed=3),
        data=SimpleNamespace(sequence_length=12, tokenizer=None, model_dump=lambda include: {}),
    )  # fmt: skip
    return made


def test_a_step_is_saved_once(made: Any) -> None:
    assert made.save(Position(step=5)) is None and made.saver.saved == []
    assert made.save(Position(step=6)) is None and made.save(Position(step=6)) is None
    ((step, replicated, state, is_best),) = made.saver.saved
    assert (step, replicated, is_best) == (6, True, False)
    assert state["step"] == 6 and state["loss_scale"] == {"cur_scale": 8}
    assert (state["faults_in_a_row"], state["faulty_step"]) == (2, 4), "of the judge of steps"
    assert made.engine.update_waits_for == "an event", "which the next update waits for"
    made.save(Position(step=7, best=Best(loss=1.0, step=7)))
    assert made.saver.saved[-1][3], "the best so far"
    made.save(Position(step=7), again=True)
    assert [step for step, *_ in made.saver.saved] == [6, 7, 7]


def test_weights_that_are_not_finite_are_not_saved(made: Any) -> None:
    made.health.check_sound = lambda boxes, step: "a.weight is not finite"
    assert made.save(Position(step=6)) == "a.weight is not finite"
    assert made.saver.saved == [] and made.saved_step == 5


def test_a_failed_save_is_reported_and_only_the_last_one_ends_the_run(made: Any) -> None:
    made.saver.error = failed = SaveFailed({1: (OSError("no room"), None)})
    made.finish()
    line = "checkpoint of step 5 could not be saved: rank 1: no room"
    assert made.lines == [line, "old.damaged: removed"] and made.saver.lines == []
    made.saver.error = failed
    with pytest.raises(TrainingError, match="^checkpoint of step 5 could not be saved: "):
        made.finish(last=True)


def test_without_a_checkpoint_there_is_no_way_back(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.run_dir = "runs/x"
    nothing = SimpleNamespace(weights=None)
    monkeypatch.setattr(checkpointing, "starting_point", lambda run_dir, load: nothing)
    with pytest.raises(TrainingError, match="^runs/x: holds no checkpoint to rewind to$"):
        made.restore()
