"""DeepSpeed's accelerator for a CPU (megalite/ranks/accelerator.py)."""

import deepspeed.accelerator.real_accelerator as real
import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

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
