"""DeepSpeed over fake process groups, for a dry run of all ranks in one process (prove/messages.py)."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.comm import comm
from deepspeed.runtime.zero import (
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
    utils,
)
from deepspeed.utils import groups

from megalite.ranks.accelerator import CPUAccelerator

EXPERT_GROUPS = tuple(
    f"_EXPERT_{kind}PARALLEL_GROUP{what}" for kind in ("", "DATA_") for what in ("", "_RANKS")
)


@contextmanager
def deepspeed_over_fakes(on_cpu: bool = False) -> Iterator[None]:
    """Inside, DeepSpeed's global state is reset, and its comparison of integers with rank 0, which would not answer, is
    disabled. on_cpu: it computes on the CPU even if the machine has a GPU."""

    def same(ints: Any) -> None:
        del ints

    name, environment = "assert_ints_same_as_other_ranks", {"LOCAL_RANK": "0"}
    own: Any = get_accelerator()
    if on_cpu:
        set_accelerator(CPUAccelerator())
    with ExitStack() as stack:
        stack.callback(set_accelerator, own)
        stack.enter_context(patch.dict(os.environ, environment))
        for module in (utils, partition_parameters, partitioned_param_coordinator, stage3):
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, same))
        for name in EXPERT_GROUPS:  # filled by an engine of a model with experts
            stack.enter_context(patch.dict(getattr(groups, name)))
        comm.cdb = None
        deepspeed.init_distributed("gloo", verbose=False)
        try:
            yield
        finally:
            comm.cdb = None
