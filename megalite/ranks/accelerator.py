"""DeepSpeed's accelerator; on the CPU one without DeepSpeed's shared-memory op, and with fp16.

DeepSpeed builds that op whenever its communication starts (deepspeed/comm/torch.py, build_shm_op): half a minute of
C++ for every environment, g++ and Python's headers, 69 MB a rank left in /dev/shm for ever, and a lock that outlives a
killed build. Its all-reduce knows no groups, so a grid of ranks cannot use it. DeepSpeed leaves it out where the
accelerator has no builder for it, and takes an accelerator of ours by `set_accelerator`. Next: launch.py.
"""

from typing import Any

from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


class CPUAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU accelerator, all of whose collectives are gloo's."""

    def is_fp16_supported(self) -> bool:
        """DeepSpeed refuses fp16 where oneDNN has no fast path for it; torch computes it on any CPU, if slowly."""
        return True

    def create_op_builder(self, class_name: str) -> Any:
        """None for the shared-memory op; DeepSpeed's builder for every other."""
        return (
            None if class_name == "ShareMemCommBuilder" else super().create_op_builder(class_name)
        )


def use_accelerator() -> Any:
    """The accelerator that DeepSpeed works with from now on; to be called before its communication starts."""
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        set_accelerator(accelerator := CPUAccelerator())
    return accelerator
