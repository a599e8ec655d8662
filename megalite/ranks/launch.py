"""Turns a process that a launcher started into a rank: environment, verdict of the validating ranks, process group.

One rank per node validates the user's input and prints errors; all ranks wait for the verdict, so that a mistake gives
one line and every rank exits with 2. Signals are in signals.py.
"""

import contextlib
import io
import logging
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from megalite.config.limits import DEFAULT_TIMEOUT
from megalite.config.rules import machine_has_gpu
from megalite.errors import ConfigError, UserError
from megalite.ranks.arguments import MOST_PORT
from megalite.ranks.devices import (
    GPUNames,
    SharedCores,
    check_same_device,
    gpu_name,
    library_settings,
    name_gpu,
    own_gpu,
    raise_open_files,
    unused_gpu_line,
    use_exact_products,
    visible_gpus,
)
from megalite.ranks.local import free_port
from megalite.ranks.rank_info import RankInfo, from_environment, rank_info
from megalite.ranks.run_program import print_line
from megalite.ranks.signals import listen, settle

T = TypeVar("T")
WAIT = timedelta(hours=2)  # for the validating ranks, which may read whole corpora
PROGRESS_EVERY = timedelta(seconds=60)  # between two lines about missing ranks
VERDICT_WAIT = timedelta(seconds=10)  # until a verdict that ends all ranks has reached them
# The default of torch and DeepSpeed, for launchers that set no port, such as MPI's.
DEFAULT_PORT = "29500"
VISIBLE, PASSED_ON = "CUDA_VISIBLE_DEVICES", "MEGALITE_VISIBLE_DEVICES"
"""GPUs that the user has chosen. `deepspeed --num_gpus` replaces the variable, so our launchers pass its value on."""
# On no network (RFC 5737): it is routed like every address outside of this one's.
OUTSIDE = "192.0.2.1"
_GOOD, _PREPARED = "0", "prepared"


def start_ranks(
    prepare: Callable[[bool], T],
    timeout: Callable[[T], timedelta] = lambda prepared: DEFAULT_TIMEOUT,
    differs: Callable[[T, T], str | None] | None = None,
) -> tuple[RankInfo, T]:
    """Makes this process a rank of an initialised world, and returns its rank info and the result of `prepare`.
    timeout: returns the time limit of a collective for that result.

    prepare(True) is called on one rank per node and checks everything. If it raises UserError, its line is printed once
    and every rank exits with 2. With `differs` the other ranks get rank 0's result by pickle, and differs(rank 0's
    result, own result) is called on each node; a line that it returns is an error too. Without `differs` prepare(False)
    is called on the other ranks, which may skip slow checks.
    """
    listen()
    here = rank_info()
    _set_environment(here)
    raise_open_files()
    import torch

    if threads_unset := "OMP_NUM_THREADS" not in os.environ:
        # Until all ranks have reported their cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))
    store = _meet(here)
    cores = SharedCores(store)
    _quieten(here)
    visible = visible_gpus()
    if visible == 0:
        if here.local_rank == 0 and (line := unused_gpu_line()) is not None:
            print_line(RuntimeError(line))
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_exact_products()
    prepared = _agree(store, here, _after_devices(store, here, visible, prepare), differs)
    RankInfo.started = True
    if threads_unset:
        torch.set_num_threads(cores.own())
    _join_world(store, here, visible, timeout(prepared))
    return here, prepared


def _meet(here: RankInfo) -> Any:
    """The store that all ranks share. Raises ConfigError if another program or run has its port."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=WAIT))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise _port_taken("program") from None
    if store.add("came", 1) > here.world_size:
        error = _port_taken("run")
        error.agreed = here.local_rank != 0  # one line a node
        raise error
    return store


def _join_world(store: Any, here: RankInfo, visible: int, timeout: timedelta) -> None:
    """Gives this rank its device, and makes the process group of all ranks."""
    import deepspeed
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from megalite.ranks.accelerator import use_accelerator

    accelerator = use_accelerator()
    device = accelerator.device_name()
    if device == "cpu":
        # DeepSpeed has its own backend for CPUs, but gloo has every collective that is used here.
        backend = "gloo"
    else:
        gpu = own_gpu(here.local_rank, here.local_size, visible)
        accelerator.set_device(gpu)
        name_gpu(gpu)
        backend = f"cpu:gloo,{device}:{accelerator.communication_backend_name()}"
    dist.init_process_group(
        backend,
        store=PrefixStore("world", store),
        rank=here.rank,
        world_size=here.world_size,
        timeout=timeout,
    )
    with quiet():
        deepspeed.init_distributed(verbose=False)


def _after_devices(
    store: Any, here: RankInfo, visible: int, prepare: Callable[[bool], T]
) -> Callable[[bool], T]:
    """`prepare`, preceded by a check that all nodes compute on GPUs or all on CPUs, and that this node has a GPU for
    each of its ranks. visible: number of GPUs that each rank sees."""
    names = GPUNames(store, socket.gethostname())
    # Also if the user asks for GPUs (DS_ACCELERATOR) and there is none.
    on_gpus = visible > 0 or machine_has_gpu()
    too_few = on_gpus and visible < here.local_size
    if too_few and visible == 1:
        names.report(gpu_name(0), here.local_size)

    def check_and_prepare(thorough: bool) -> T:
        if thorough:
            check_same_device(store, on_gpus)
            if too_few:
                own_gpu(here.local_rank, here.local_size, visible)
                names.check(here.local_size)
        return prepare(thorough)

    return check_and_prepare


def _port_taken(by: str) -> ConfigError:
    port = os.environ["MASTER_PORT"]
    return ConfigError(
        f"MASTER_PORT: {port}: in use by another {by}: must be free: --master_port N"
    )


def stop_ranks() -> None:
    """Destroys the process groups, if there are any (collective). A rank that has failed must not call it: NCCL waits
    for all ranks of each group. That rank ends its process instead (run_program.py)."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _agree(
    store: Any,
    here: RankInfo,
    prepare: Callable[[bool], T],
    differs: Callable[[T, T], str | None] | None,
) -> T:
    """Passes the validating ranks' verdict, an exit code, to all ranks. Returns what `prepare` made, or ends the
    process."""
    import torch.distributed as dist

    prepared = None
    if here.local_rank == 0:
        try:
            prepared = prepare(True)
            if differs is not None:
                _compare_nodes(store, here, prepared, differs)
        except Exception as error:
            if here.rank == 0:
                store.set(_PREPARED, b"")  # the other nodes then compare nothing
            if not isinstance(error, UserError):
                traceback.print_exc()
            elif store.add(f"said: {error}", 1) == 1:  # once, not on every node
                print_line(error)
            store.set("verdict", str(error.exit_code if isinstance(error, UserError) else 1))
    if store.add("checked", 1) == here.world_size:
        store.compare_set("verdict", "", _GOOD)
    try:
        _wait_for_verdict(store, here)
        verdict = store.get("verdict").decode()
    except dist.DistError:
        print_line(RuntimeError(f"rank {here.rank}: lost rank 0 during the start"))
        verdict = "1"
    if verdict != _GOOD:
        settle(int(verdict))
        with contextlib.suppress(dist.DistError):
            # Exit together: rank 0 may host the store, and a launcher that sees one exit kills ranks that have not read
            # the verdict yet.
            if store.add("received", 1) == here.world_size:
                store.set("all received", "")
            store.wait(["all received"], VERDICT_WAIT)
            if here.rank == 0:
                # The others still read the store, and torch prints stack traces if it is gone.
                time.sleep(0.2)
        # Not by sys.exit, whose cleanup takes longer: a launcher that sees one exit kills the others within a second.
        sys.stderr.flush()
        os._exit(int(verdict))
    if here.local_rank == 0:
        return prepared  # type: ignore[return-value]
    return prepare(False) if differs is None else pickle.loads(store.get(_PREPARED))


def _compare_nodes(
    store: Any, here: RankInfo, prepared: T, differs: Callable[[T, T], str | None]
) -> None:
    """Rank 0 publishes what it prepared. Raises ConfigError on a node that prepared something else."""
    import torch.distributed as dist

    if here.rank == 0:
        store.set(_PREPARED, pickle.dumps(prepared))
        return
    with contextlib.suppress(dist.DistError):  # rank 0 is lost: waiting for the verdict reports it
        store.wait([_PREPARED], WAIT)
        first = store.get(_PREPARED)
        if first and (found := differs(pickle.loads(first), prepared)) is not None:
            raise ConfigError(f"{socket.gethostname()}: {found}")


def _wait_for_verdict(store: Any, here: RankInfo) -> None:
    """Waits until all ranks have started and the input is validated. Rank 0 prints at times how many are missing."""
    import torch.distributed as dist

    deadline = time.monotonic() + WAIT.total_seconds()
    while (left := deadline - time.monotonic()) > 0:
        try:
            return store.wait(["verdict"], min(PROGRESS_EVERY, timedelta(seconds=left)))
        except dist.DistStoreError:  # a timeout; a lost store raises DistNetworkError
            came, ready = store.add("came", 0), store.add("checked", 0)
            if here.rank == 0:
                line = f"{came} of {here.world_size} ranks have started, {ready} are ready"
                print_line(RuntimeError(f"waiting for other ranks: {line}"))
    store.wait(["verdict"], timedelta(seconds=1))


def _set_environment(here: RankInfo) -> None:
    env = os.environ
    if (chosen := env.pop(PASSED_ON, None)) is not None:
        env[VISIBLE] = chosen
    if "MASTER_ADDR" not in env and here.local_size < here.world_size:
        rule = f"must name the first node: the {here.world_size} ranks are on several nodes (docs/clusters.md)"
        raise ConfigError(f"MASTER_ADDR: missing: {rule}")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env and here.world_size > 1:
        env["MASTER_PORT"] = DEFAULT_PORT
    elif "MASTER_PORT" in env:
        from_environment("MASTER_PORT", 0, least=1, most=MOST_PORT)
    else:
        env["MASTER_PORT"] = str(free_port())
    env["LOCAL_WORLD_SIZE"] = str(here.local_size)
    env.update(
        RANK=str(here.rank), WORLD_SIZE=str(here.world_size), LOCAL_RANK=str(here.local_rank)
    )
    if not machine_has_gpu():
        env.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would choose the same, with a warning
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("HF_HUB_OFFLINE", "1")
    interface = env.get("GLOO_SOCKET_IFNAME") or _interface(env["MASTER_ADDR"], here)
    env.update(library_settings(env, machine_has_gpu(), interface))


def _interface(master: str, here: RankInfo) -> str | None:
    """The network interface for this rank's connections; None: libraries choose. master: MASTER_ADDR."""
    interface = interface_towards(master)
    several = here.local_size < here.world_size
    if interface == "lo" and several and not master.startswith(("127.", "localhost")):
        # On the first node /etc/hosts may give its name a loopback address, which other nodes cannot reach.
        interface = interface_towards(OUTSIDE)
    return interface


def interface_towards(address: str) -> str | None:
    """Name of the network interface that routes to `address`; None if it cannot be found."""
    import psutil

    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: the kernel only chooses a route
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    return None


def _quieten(here: RankInfo) -> None:
    """Limits libraries' log output to warnings on rank 0 and errors on the other ranks. One rank of each node shows
    what torch finds wrong with the node's GPUs."""
    rank = here.rank
    level = logging.WARNING if rank == 0 else logging.ERROR
    warnings.filterwarnings("ignore")
    if here.local_rank == 0:
        warnings.filterwarnings("default", category=UserWarning, module=r"torch\.cuda\b")
    for name in ("megalite", "DeepSpeed", "deepspeed", "torch.distributed", "transformers"):
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning" if rank == 0 else "error")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager that captures a library's output, and prints it to standard error only if the library fails:
    programs print JSON on standard output."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held), contextlib.redirect_stderr(held):
            yield
    except BaseException:
        print(held.getvalue(), file=sys.stderr)
        raise
