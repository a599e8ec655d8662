"""DeepSpeed's accelerator; on the CPU, one without DeepSpeed's shared-memory op and with fp16; on GPUs, one that finds
free memory whatever CUDA_VISIBLE_DEVICES contains.

DeepSpeed builds that op whenever its communication starts (deepspeed/comm/torch.py, build_shm_op). The build takes half
a minute in each new environment and needs g++ and Python's headers; the op leaves 69 MB per rank in /dev/shm, and a
killed build leaves its lock. A grid of ranks cannot use the op, because its all-reduce ignores process groups.
DeepSpeed skips the op if the accelerator has no builder for it, so `set_accelerator` installs one without it.
Next: launch.py.
"""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator


class CPUAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU accelerator with gloo for every collective."""

    def is_fp16_supported(self) -> bool:
        """Always true. DeepSpeed rejects fp16 if oneDNN has no fast path for it, but torch computes it on any CPU."""
        return True

    def create_op_builder(self, class_name: str) -> Any:
        """None for the shared-memory op; DeepSpeed's builder for any other op."""
        return (
            None if class_name == "ShareMemCommBuilder" else super().create_op_builder(class_name)
        )


class CUDAAccelerator(CUDA_Accelerator):
    """DeepSpeed's accelerator for NVIDIA GPUs."""

    def available_memory(self, device_index: int | None = None) -> int:
        """Free bytes of a GPU; None: the current one. DeepSpeed looks it up by its number in CUDA_VISIBLE_DEVICES, and
        fails if that has UUIDs instead, of GPUs or of their MIG slices."""
        return torch.cuda.mem_get_info(device_index)[0]


def use_accelerator() -> Any:
    """Sets and returns the accelerator that DeepSpeed uses. Must be called before its communication starts."""
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        set_accelerator(accelerator := CPUAccelerator())
    elif accelerator.device_name() == "cuda":
        set_accelerator(accelerator := CUDAAccelerator())
    return accelerator
