"""Rank 0 asks and all ranks answer (megalite/inference/answers.py); here two ranks are two threads."""

import queue
import threading
from typing import Any

import pytest
import torch.distributed as dist

from megalite.inference.answers import Answers
from megalite.inference.likelihood import Likelihood


class Asked(Answers):
    """Records the questions instead of asking a model."""

    def __init__(self, rank: int) -> None:
        self.rank, self.asked = rank, list[Any]()

    def likelihoods(self, rows: Any) -> list[Likelihood]:
        self.asked.append(rows)
        return [Likelihood(-float(self.rank), True)]


def test_every_rank_takes_part_in_each_question_until_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: queue.Queue[Any] = queue.Queue()
    first = threading.current_thread()

    def broadcast(box: list[Any]) -> None:
        if threading.current_thread() is first:
            told.put(box[0])
        else:
            box[0] = told.get(timeout=10)

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    zero, one = Asked(0), Asked(1)
    other = threading.Thread(target=one.take_part, daemon=True)
    other.start()
    rows = [([1, 2], [0, 1])]
    assert zero.ask("likelihoods", rows) == [Likelihood(0.0, True)]
    zero.ask("likelihoods", [])
    zero.end()
    other.join(10)
    assert not other.is_alive() and one.asked == zero.asked == [rows, []]
    assert told.empty()
