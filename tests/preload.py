"""What a test's rank has imported before it begins.

The forkserver of tests/ranks.py imports this file once; every rank is a fork of it and finds torch,
DeepSpeed, transformers' models, DeepSpeed's shared-memory op and megalite already in memory. Nothing here
may start a thread: a fork copies only the thread that forks.
"""

import contextlib
import importlib
import pkgutil

import deepspeed.runtime.pipe.engine  # noqa: F401
import deepspeed.runtime.pipe.module  # noqa: F401
import pytest  # noqa: F401  (test modules import it)
import torch.distributed.checkpoint  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from deepspeed.accelerator import get_accelerator

import megalite
from megalite.launch import load_shared_memory_op


def load_op() -> None:
    """The op that DeepSpeed's backend loads at every start of its communication, once for all ranks: in a rank the
    same call finds it loaded."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible(verbose=False):
        load_shared_memory_op(builder)


def import_megalite() -> None:
    """Import each module of megalite; one that fails is left for the test that imports it to report."""
    for module in pkgutil.walk_packages(megalite.__path__, "megalite.", onerror=lambda name: None):
        with contextlib.suppress(Exception):
            importlib.import_module(module.name)


load_op()
import_megalite()
