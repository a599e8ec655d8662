"""A build that was killed leaves torch's lock file behind; a start must not wait for it for ever."""

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

from tests.ranks import run_ranks


def load_beside_a_stale_lock(rank: int, world_size: int) -> float:
    from deepspeed.accelerator import get_accelerator

    from megalite.launch import load_shared_memory_op

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    type(builder)._loaded_ops.clear()  # as in a process that has not loaded it
    start = time.monotonic()
    load_shared_memory_op(builder)
    return time.monotonic() - start


def test_a_stale_lock_is_removed() -> None:
    run_ranks(1, load_beside_a_stale_lock)  # the op stands
    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    os.close(os.open(lock, os.O_CREAT))
    assert max(run_ranks(2, load_beside_a_stale_lock, timeout_seconds=100)) < 90
    assert not lock.exists()
