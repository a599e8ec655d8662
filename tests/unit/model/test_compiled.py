"""What the compiler makes of pieces (megalite/model/compiled.py), by its backend that compiles nothing."""

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from megalite.model.compiled import compiled

FORMS = 12  # more than torch compiles of one function by default


def test_a_piece_has_many_forms_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward on a GPU runs in a thread of autograd's, and the compiler's settings are a thread's own."""
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
