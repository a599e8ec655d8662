"""A rank's steps on the host (megalite/pipeline/interpreter.py), with a mailbox that records them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.pipeline.interpreter import Interpreter
from megalite.pipeline.steps import Act, Receive, Send, Step, Wait
from megalite.programs.program import Action, Value


class Mailbox:
    """Records its calls; a received value is the micro-batch's number."""

    def __init__(self) -> None:
        self.did: list[Any] = []

    def post(self, key: Value, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.did.append(("post", str(key), source, shape, dtype))

    def take(self, key: Value) -> Tensor:
        self.did.append(("take", str(key)))
        return torch.tensor(float(key.micro_batch))

    def send(self, key: Value, tensor: Tensor, target: int) -> None:
        self.did.append(("send", str(key), tensor.item(), target))

    def wait(self, key: Value) -> None:
        self.did.append(("wait", str(key)))

    def finish(self) -> None:
        self.did.append(("finish",))


ACTIVATION, FURTHER = Value("activation", 1, 3), Value("activation", 2, 3)


def made(**keys: Any) -> tuple[Mailbox, Interpreter]:
    mailbox: Any = Mailbox()
    return mailbox, Interpreter(mailbox, 2, torch.bfloat16, **keys)


def test_values_are_received_processed_and_sent() -> None:
    mailbox, interpreter = made()
    done: list[Any] = []

    def perform(action: Action, value: Tensor | None) -> Tensor | None:
        done.append((str(action), None if value is None else value.item(), interpreter.instruction))
        return torch.tensor(10.0 + len(done))

    steps: list[Step] = [
        Receive(ACTIVATION, 0),
        Act(Action("F", 1, 3)),
        Send(FURTHER, 2),
        Wait(FURTHER),
    ]
    interpreter.run(steps, perform, lambda value: (4, value.chunk))
    assert done == [("F1.3", 3.0, "forward of micro-batch 3")]
    assert mailbox.did == [
        ("post", str(ACTIVATION), 0, (4, 1), torch.bfloat16),
        ("take", str(ACTIVATION)),
        ("send", str(FURTHER), 11.0, 2),
        ("wait", str(FURTHER)),
        ("finish",),
    ]
    assert interpreter.instruction == ""


def test_a_value_that_stays_on_the_rank_is_no_message() -> None:
    """On a rank with chunks 1 and 2, chunk 2 takes the output of chunk 1, whose gradient goes back the same way."""
    mailbox, interpreter = made(tells_chunk=True)
    taken: list[tuple[str, float | None, str]] = []

    def perform(action: Action, value: Tensor | None) -> Tensor | None:
        given = None if value is None else value.item()
        taken.append((str(action), given, interpreter.instruction))
        last = action.chunk == 2 and action.kind == "F"
        return None if last else torch.tensor({"F": 1.0, "B": 2.0}[action.kind])

    actions = [Action("F", 1, 0), Action("F", 2, 0), Action("B", 2, 0), Action("B", 1, 0)]
    steps: list[Step] = [Receive(Value("activation", 1, 0), 0), *map(Act, actions)]
    steps.append(Send(Value("gradient", 0, 0), 0))
    interpreter.run(steps, perform, lambda value: ())
    assert taken == [
        ("F1.0", 0.0, "forward of micro-batch 0 on chunk 1"),
        ("F2.0", 1.0, "forward of micro-batch 0 on chunk 2"),
        ("B2.0", None, "backward of micro-batch 0 on chunk 2"),
        ("B1.0", 2.0, "backward of micro-batch 0 on chunk 1"),
    ]
    assert [did[0] for did in mailbox.did] == ["post", "take", "send", "finish"]


def test_missing_and_unused_results_of_actions_are_errors() -> None:
    _, interpreter = made()
    with pytest.raises(AssertionError, match="F0.0 gave nothing"):
        interpreter.run([Act(Action("F", 0, 0))], lambda action, value: None, lambda value: ())
    assert interpreter.instruction == "forward of micro-batch 0", "told in the report of the error"
    with pytest.raises(AssertionError, match="made and never used: .*chunk=1"):
        interpreter.run(
            [Act(Action("F", 0, 0))], lambda action, value: torch.ones(1), lambda value: ()
        )
