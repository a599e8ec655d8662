"""The GPUs that a rank sees, which of them is its own, and the environment variables that torch reads at its start.

Whether a machine has GPUs at all is a question of config/rules.py, which needs no torch. Next: launch.py.
"""

import os
import resource
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from megalite.config.rules import machine_has_gpu
from megalite.errors import ConfigError

HEARING = timedelta(minutes=5)  # that the ranks of a node take to name their GPUs


def visible_gpus() -> int:
    """GPUs that torch sees from this process; 0 where ranks compute on the CPU."""
    if not machine_has_gpu():
        return 0
    import torch

    return torch.accelerator.device_count()


def gpu_memory_bytes() -> int | None:
    """Of the first GPU that torch sees; None where ranks compute on the CPU."""
    if not visible_gpus():
        return None
    import torch

    module: Any = torch.get_device_module()
    return module.get_device_properties(0).total_memory


def own_gpu(local_rank: int, local_size: int, visible: int) -> int:
    """Ordinal of a rank's GPU. A launcher shows all GPUs of a node to each of its ranks, or its own alone, as Slurm
    does for --gpus-per-task=1. Raises ConfigError where there are too few."""
    if visible == 1:
        return 0
    if visible < local_size:
        raise too_few(local_size, visible)
    return local_rank


def name_gpu(ordinal: int) -> None:
    """Tells DeepSpeed which GPU is this rank's own. It takes LOCAL_RANK for the ordinal (runtime/engine.py,
    `_set_distributed_vars`; `zero.Init`; assert_ints_same_as_other_ranks), which it is not where a rank sees its own
    GPU alone, and wants Open MPI's variable to say the same. To be called once nobody asks for the local rank any more.
    """
    os.environ["LOCAL_RANK"] = str(ordinal)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)


def too_few(local_size: int, gpus: int) -> ConfigError:
    """What is wrong with so many ranks on a node with so many GPUs."""
    rule = f"must be at most the {gpus} GPU{'s' * (gpus != 1)} that torch sees there: a rank takes one of its own"
    return ConfigError(
        f"ranks on a node: {local_size}: {rule} (DS_ACCELERATOR=cpu computes without)"
    )


class GPUNames:
    """On a node where each of several ranks sees one GPU: whether they are different ones. Each rank tells its GPU's
    name; one of them may then check. store: the ranks' common one; node: its name."""

    def __init__(self, store: Any, node: str) -> None:
        self.store, self.node = store, node

    def tell(self, name: str, local_size: int) -> None:
        if self.store.add(f"gpu/{self.node}/{name}", 1) > 1:
            self.store.set(f"gpus shared/{self.node}", name)
        if self.store.add(f"gpus told/{self.node}", 1) == local_size:
            self.store.set(f"gpus all told/{self.node}", "")

    def check(self, local_size: int) -> None:
        """Raises ConfigError where two ranks of the node share a GPU; waits until all have told theirs."""
        self.store.wait([f"gpus all told/{self.node}"], HEARING)
        if self.store.check([f"gpus shared/{self.node}"]):
            raise too_few(local_size, 1)


def gpu_name(ordinal: int) -> str:
    """Tells a GPU from every other one of the machine, whatever number a process knows it by."""
    import torch

    module: Any = torch.get_device_module()
    return str(getattr(module.get_device_properties(ordinal), "uuid", f"{os.getpid()} cannot tell"))


def library_settings(
    environment: Mapping[str, str], on_gpu: bool, interface: str | None
) -> dict[str, str]:
    """Variables that torch and NCCL read when they start, where the user has not set them. interface: the network's
    that leads to the first node."""
    wanted = {
        # A gloo group connects two ranks when they first talk; without it, each to each at once: at 1,024 ranks that
        # is 1,027 descriptors a group.
        "TORCH_GLOO_LAZY_INIT": "1",
    }
    if interface is not None:
        # gloo resolves the host's name, and where that fails takes 127.0.0.1 and dies while other nodes hang.
        wanted["GLOO_SOCKET_IFNAME"] = interface
    if on_gpu:
        wanted |= (
            {}
            if "PYTORCH_CUDA_ALLOC_CONF" in environment
            else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        )
        wanted["TORCH_FR_BUFFER_SIZE"] = (
            "2000"  # entries of the flight recorder, which the watchdog reads
        )
        # A collective that begins beside products gets processors as they come free, before the products' next blocks.
        wanted["TORCH_NCCL_HIGH_PRIORITY"] = "1"
        # NCCL's bootstrap, and its data where there is no InfiniBand. Of a lone node it takes what it likes.
        wanted |= {"NCCL_SOCKET_IFNAME": f"={interface}"} if interface not in (None, "lo") else {}
    else:
        # Nothing is compiled on a CPU; DeepSpeed compiles Muon for every optimizer, which takes a second of a start.
        wanted["TORCHDYNAMO_DISABLE"] = "1"
    return {name: value for name, value in wanted.items() if name not in environment}


def sum_in_fp32() -> None:
    """Products of 16-bit matrices are summed in fp32 to the end, also where a kernel splits the sum among its parts."""
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def be_deterministic() -> None:
    """From now on the same numbers from the same inputs, to the bit; to be called before the first product and the
    first collective on a GPU."""
    import torch
    import torch.utils.deterministic

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault(
        "NCCL_ALGO", "Ring"
    )  # no sums within switches, and no choice by measured speed
    torch.use_deterministic_algorithms(True)
    # What torch.empty gives is written here before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def raise_open_files() -> None:
    """Lets this process open as many files as the system allows: sockets to other ranks count as such."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
