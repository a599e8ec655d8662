"""Compiled functions (megalite/model/compiled.py), with a backend that does not compile."""

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from megalite.model.compiled import compiled

FORMS = 12  # more than the number of versions of a function that torch compiles by default


def test_a_piece_has_many_forms_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU backward runs in a thread of autograd, and the compiler's settings are per thread."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def doubled(x: Tensor) -> Tensor:
        return x * 2

    piece, found = compiled(doubled), list[float]()

    def backward() -> None:
        found.extend(float(piece(torch.ones((1,) * dims)).sum()) for dims in range(FORMS))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert found == [2.0] * FORMS
