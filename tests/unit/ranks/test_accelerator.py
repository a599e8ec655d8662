"""DeepSpeed's accelerators as megalite uses them (megalite/ranks/accelerator.py)."""

from unittest.mock import MagicMock

import deepspeed.accelerator.real_accelerator as real
import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from megalite.ranks.accelerator import CPUAccelerator, use_accelerator


def test_the_shared_memory_op_is_left_out_and_no_other() -> None:
    own = CPUAccelerator()
    assert own.create_op_builder("ShareMemCommBuilder") is None
    assert own.create_op_builder("CPUAdamBuilder") is not None
    assert CPU_Accelerator().create_op_builder("ShareMemCommBuilder") is not None, "why it is here"


def test_fp16_is_computed_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: False)
    assert CPUAccelerator().is_fp16_supported()


def test_deepspeed_works_with_it_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "ds_accelerator", CPU_Accelerator())
    used = use_accelerator()
    assert isinstance(used, CPUAccelerator) and real.get_accelerator() is used


@pytest.mark.parametrize("visible", ["GPU-8c2f6a1e-0000-0000-0000-000000000000", "MIG-1", "1,0"])
def test_free_memory_is_found_however_gpus_are_named(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-1 and 2 ask for it when they are built."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("deepspeed.accelerator.cuda_accelerator.pynvml", MagicMock())
    monkeypatch.setattr(real, "ds_accelerator", CUDA_Accelerator())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 8))
    used = use_accelerator()
    assert used.available_memory() == 5 and real.get_accelerator() is used
