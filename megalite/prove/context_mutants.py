"""Faults of the context axis: its sums, and a rank's tokens. Next: mutants.py, which lists the faults."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

import megalite.parallel.rows as rows_over
from megalite.config import Config
from megalite.model.context import Context
from megalite.parallel.rows import Rows
from megalite.prove.planting import change_forward, put
from megalite.prove.trace import Plant, Session


def of_the_context_axis(config: Config) -> Iterable[tuple[str, Plant]]:
    """The faults that apply to a resolved config with several context ranks, by name."""
    if config.parallel.context_attention == "gather":
        yield "rows._GatherRows.backward: the sum is missing", _key_gradients(0)
        yield "rows._GatherRows.backward: the sum is computed twice", _key_gradients(2)
    yield "the last context rank has the positions of the first", _others_rows
    if config.data.reset_attention:
        yield "documents are not kept apart", _documents_together


_sum_of_rows = rows_over._scatter


def _key_gradients(times: int) -> Plant:
    """times: 0: a rank's keys get gradients only from its own queries; 2: twice the sum."""

    def scattered(whole: Tensor, rows: Rows) -> Tensor:
        if times:
            return _sum_of_rows(whole, rows) * times
        return rows.cut(whole, whole.dim() - 2)

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        if event == "built":
            put(stack, rows_over, "_scatter", scattered)

    return plant


def _change_context(session: Session, change: Callable[[Context], Context]) -> None:
    """Changes the context of every forward in training."""

    def changed(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        if len(arguments) > 2:
            arguments = (*arguments[:2], change(arguments[2]), *arguments[3:])
        return forward(*arguments)

    change_forward(session, changed)


def _others_rows(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if not session.engine.grid.context.is_last:
        return

    def change(context: Context) -> Context:
        assert context.rows is not None
        first = replace(context.rows, axis=replace(context.rows.axis, rank=0))
        return replace(context, rows=first, shared={})

    _change_context(session, change)


def _documents_together(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    def change(context: Context) -> Context:
        return replace(context, documents=None, bounds=None, shared={})

    _change_context(session, change)
