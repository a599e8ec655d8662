"""The worker processes that tokenize. Each has at most a few chunks in flight, which bounds the memory.

Next: preprocessing.py.
"""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process

from megalite.data.documents import TextChunk
from megalite.data.partial import Encoded
from megalite.data.tasks import Task
from megalite.errors import DataError, MegaliteError
from megalite.inputs import reading

_IN_FLIGHT = 3  # chunks per worker


def tokenized(
    chunks: Iterable[TextChunk], task: Task, workers: int
) -> Iterator[tuple[TextChunk, Encoded]]:
    """Yields each chunk with its tokens, in order. If `workers` is 1, this process tokenizes. Raises MegaliteError if a
    worker is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if workers == 1:
        yield from ((chunk, _encode(task, chunk)) for chunk in chunks)
        return
    in_flight: deque[tuple[TextChunk, Future[Encoded]]] = deque()
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(task,)
    )
    try:
        for chunk in chunks:
            with _interrupts_later():
                in_flight.append((chunk, pool.submit(_work, chunk)))
            while in_flight:
                first, future = in_flight[0]
                if len(in_flight) < _IN_FLIGHT * workers and not future.done():
                    break
                in_flight.popleft()
                yield first, future.result()
        for first, future in in_flight:
            yield first, future.result()
    except BrokenProcessPool:
        raise MegaliteError(
            "a worker was killed (out of memory?): run the same command again to resume"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Context manager that delays Ctrl-C until the end of the block. Processes started in the block never get it: a
    worker would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_task: Task  # of a worker process


def _start_worker(task: Task) -> None:
    global _task
    _task = task
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(chunk: TextChunk) -> Encoded:
    return _encode(_task, chunk)


def _encode(task: Task, chunk: TextChunk) -> Encoded:
    start = chunk.start
    where = f"--input: number {start.input + 1}, from line or document {start.number} on"
    with reading(where, DataError):  # tokenizers may raise anything over a text
        return task.encode(chunk)
