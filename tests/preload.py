"""Imports for the ranks of tests.

The forkserver of tests/ranks.py imports this file once; every rank is a fork of it, with torch, DeepSpeed,
transformers' models and megalite already in memory. Nothing here may start a thread: a fork copies only the thread that
forks.
"""

import contextlib
import gc
import importlib
import pkgutil

import deepspeed.module_inject.auto_ep_layer  # noqa: F401
import deepspeed.runtime.pipe.engine  # noqa: F401
import deepspeed.runtime.pipe.module  # noqa: F401
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (each engine's: a second, for torch's compiler)
import numpy.ma  # noqa: F401
import pytest  # noqa: F401  (test modules import it)
import torch.distributed.checkpoint  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import megalite
from megalite.ranks.accelerator import use_accelerator
from megalite.training import mfu


def import_megalite() -> None:
    """Imports each module of megalite. Failures are ignored, since the test that imports the module will report
    them."""
    for module in pkgutil.walk_packages(megalite.__path__, "megalite.", onerror=lambda name: None):
        with contextlib.suppress(Exception):
            importlib.import_module(module.name)


use_accelerator()
import_megalite()
# The machine's peak is measured at each start, which takes longer than many tests' runs.
mfu.ROWS["cpu"], mfu.MEASURED_SECONDS = 256, 0.01
# So that a rank's garbage collector neither scans these objects nor copies their pages.
gc.collect()
gc.freeze()
