"""The check before a run with states in files (engine/nvme.py); with the op itself: tests/distributed/test_nvme.py."""

import pytest
import torch
import torch.utils.cpp_extension
from deepspeed import git_version_info

from megalite.engine import nvme


def test_on_machines_with_gpus_the_op_needs_the_cuda_toolkit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's own error there is a TypeError about a path."""
    monkeypatch.setattr(git_version_info, "installed_ops", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(nvme.shutil, "which", lambda name: name)
    with pytest.raises(RuntimeError, match="^error: no CUDA toolkit"):
        nvme.load_op()
