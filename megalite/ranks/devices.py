"""The GPUs that a rank sees, the one that it uses, and the environment variables that torch reads when it starts.

Whether a machine has GPUs at all is decided in config/rules.py, which needs no torch. Next: launch.py.
"""

import os
import resource
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from megalite.config.rules import machine_has_gpu
from megalite.errors import ConfigError

VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
NO_GPUS = ("", "-1", "NoDevFiles")  # the last is Slurm's, for jobs without GPUs
NAMES_WAIT = timedelta(minutes=5)  # until all ranks of a node have reported their GPUs


def visible_gpus() -> int:
    """Number of GPUs that torch can use in this process; 0 if ranks compute on the CPU. If CUDA does not start, torch
    warns with the reason."""
    if not machine_has_gpu():
        return 0
    import torch

    # The count alone may come from the driver's tools, which also count GPUs that CUDA cannot use.
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def gpu_memory_bytes() -> int | None:
    """Memory of the first GPU that torch sees; None if ranks compute on the CPU."""
    if not visible_gpus():
        return None
    import torch

    module: Any = torch.get_device_module()
    return module.get_device_properties(0).total_memory


def unused_gpu_line() -> str | None:
    """A line for a machine with a GPU that torch does not see, unless the user has hidden its GPUs."""
    hidden = any(os.environ.get(name) in NO_GPUS for name in VISIBLE_GPUS)
    if hidden or not machine_has_gpu() or os.environ.get("DS_ACCELERATOR"):
        return None
    import torch

    what = f"the machine seems to have a GPU, but torch {torch.__version__} can use none"
    return (
        f"{socket.gethostname()}: {what}: training on the CPU (DS_ACCELERATOR=cpu hides this line)"
    )


def check_same_device(store: Any, on_gpus: bool) -> None:
    """Raises ConfigError unless the ranks of all nodes compute on GPUs, or all on CPUs: otherwise the ranks with GPUs
    would wait for the others in NCCL. Called once per node. store: shared by all ranks."""
    host = socket.gethostname()
    first = store.compare_set("device", "", f"{'GPU' if on_gpus else 'CPU'} {host}").decode()
    kind, _, first_host = first.partition(" ")
    if (kind == "GPU") != on_gpus:
        without = first_host if on_gpus else host
        raise ConfigError(
            f"{without}: ranks compute on the CPU there, and on GPUs on other nodes: must be the same on all nodes "
            "(does torch see its GPUs? DS_ACCELERATOR=cpu trains without GPUs)"
        )


class SharedCores:
    """Divides a node's cores among its ranks. A launcher may bind each rank to its own cores, as Slurm does; otherwise
    all ranks may use all cores. Ranks that may use the same cores report them under one name. store: shared by all
    ranks."""

    def __init__(self, store: Any) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.store, self.count = store, len(cores)
        self.name = f"cores/{socket.gethostname()}/{','.join(map(str, cores))}"
        store.add(self.name, 1)

    def own(self) -> int:
        """Number of cores for this rank, at least 1. Must be called when all ranks of the node have reported theirs."""
        return max(1, self.count // self.store.add(self.name, 0))


def device_name() -> str:
    """The name of what this rank computes on: a GPU's, or "CPU"."""
    if not visible_gpus():
        return "CPU"
    import torch

    module: Any = torch.get_device_module()
    return module.get_device_name()


def own_gpu(local_rank: int, local_size: int, visible: int) -> int:
    """Ordinal of a rank's GPU. A launcher makes all GPUs of the node visible to each rank, or only the rank's own, as
    Slurm does with --gpus-per-task=1. Raises ConfigError if there are too few."""
    if visible == 1:
        return 0
    if visible < local_size:
        raise too_few(local_size, visible)
    return local_rank


def name_gpu(ordinal: int) -> None:
    """Sets LOCAL_RANK to the ordinal of this rank's GPU, since DeepSpeed takes it for that (runtime/engine.py,
    `_set_distributed_vars`; `zero.Init`; assert_ints_same_as_other_ranks), although a rank may see only its own GPU.
    Removes Open MPI's variable, with which DeepSpeed compares it. Must be called after the last use of the local rank.
    """
    os.environ["LOCAL_RANK"] = str(ordinal)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)


def too_few(local_size: int, gpus: int) -> ConfigError:
    """The error for `local_size` ranks on a node with only `gpus` GPUs."""
    plural = "" if gpus == 1 else "s"
    rule = f"must be at most the {gpus} GPU{plural} that torch sees there: each rank needs its own"
    return ConfigError(
        f"ranks on a node: {local_size}: {rule} (DS_ACCELERATOR=cpu trains without GPUs)"
    )


class GPUNames:
    """Checks, on a node where each of several ranks sees one GPU, that these are different GPUs. Each rank reports the
    name of its GPU; then one of them may check. store: shared by all ranks; node: the node's name."""

    def __init__(self, store: Any, node: str) -> None:
        self.store, self.node = store, node

    def report(self, name: str, local_size: int) -> None:
        """Reports this rank's GPU. local_size: number of ranks on the node."""
        if self.store.add(f"gpu/{self.node}/{name}", 1) > 1:
            self.store.set(f"gpus shared/{self.node}", name)
        if self.store.add(f"gpus reported/{self.node}", 1) == local_size:
            self.store.set(f"gpus all reported/{self.node}", "")

    def check(self, local_size: int) -> None:
        """Waits until all ranks of the node have reported their GPUs. Raises ConfigError if two of them share one."""
        self.store.wait([f"gpus all reported/{self.node}"], NAMES_WAIT)
        if self.store.check([f"gpus shared/{self.node}"]):
            raise too_few(local_size, 1)


def gpu_name(ordinal: int) -> str:
    """A name that is unique to a GPU of the machine, whichever ordinal it has in a process."""
    import torch

    module: Any = torch.get_device_module()
    return str(getattr(module.get_device_properties(ordinal), "uuid", f"{os.getpid()} cannot tell"))


def library_settings(
    environment: Mapping[str, str], on_gpu: bool, interface: str | None
) -> dict[str, str]:
    """Environment variables that torch and NCCL read when they start, except those that the user has set. interface:
    the network interface that leads to the first node."""
    wanted = {
        # A gloo group then connects two ranks when they first communicate. Otherwise it connects all pairs at once: at
        # 1,024 ranks that takes 1,027 file descriptors per group.
        "TORCH_GLOO_LAZY_INIT": "1",
    }
    if interface is not None:
        # Otherwise gloo resolves the host name. If that fails it binds to 127.0.0.1 and dies, and the other nodes hang.
        wanted["GLOO_SOCKET_IFNAME"] = interface
    if on_gpu:
        if "PYTORCH_CUDA_ALLOC_CONF" not in environment:
            wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        # Entries of the flight recorder, which the watchdog reads.
        wanted["TORCH_FR_BUFFER_SIZE"] = "2000"
        # A collective that runs beside matrix products then gets SMs as they become free, before the next blocks of the
        # products.
        wanted["TORCH_NCCL_HIGH_PRIORITY"] = "1"
        # For NCCL's bootstrap, and for its data if there is no InfiniBand. On a single node NCCL chooses by itself.
        if interface not in (None, "lo"):
            wanted["NCCL_SOCKET_IFNAME"] = f"={interface}"
    else:
        # DeepSpeed compiles Muon whatever the optimizer is, which would add a second to each start.
        wanted["TORCHDYNAMO_DISABLE"] = "1"
    return {name: value for name, value in wanted.items() if name not in environment}


def use_exact_products() -> None:
    """Makes matrix products of 16-bit dtypes accumulate in fp32 throughout, also in split-K kernels, and keeps fp32
    products from TF32, which an environment variable of some images allows."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def be_deterministic() -> None:
    """Makes the same inputs give the same results bit for bit. Must be called before the first matrix product and the
    first collective on a GPU."""
    import torch
    import torch.utils.deterministic

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # No sums in switches, and no algorithm chosen by measured speed.
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # Memory from torch.empty is always written before it is read here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def raise_open_files() -> None:
    """Raises this process's limit of open files to the hard limit: each socket to another rank counts as one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
