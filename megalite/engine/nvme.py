"""Optimizer states in files (`zero_optimization.offload_optimizer.device` nvme): checks of a node before ranks start,
and the folders of a run. DeepSpeed and engine/zero3.py read and write the files.

DeepSpeed compiles an op for it, async_io, on first use. If that finds no disk space or no page-locked memory, it kills
the process, or continues silently with wrong states. So a separate process tries it first (`python -m` this module).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megalite.config import Config
from megalite.config.section import broken
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.plan.states import FILE_UNIT_BYTES, SwapSizes, parameter_sizes, swap_sizes

DEVICE = "zero_optimization.offload_optimizer.device"
PATH = "zero_optimization.offload_optimizer.nvme_path"
PATIENCE_SECONDS = 20.0  # after this, a line says that the op is being built
TRIED_BYTES = 2**20
# The steps of `main`, which prints each before it starts.
BUILD, LOCK, USE = "build the op", "lock the buffers", "use the disk"


def check_nvme(config: Config, spec: TransformerSpec, local_ranks: int) -> None:
    """Raises ConfigError if this node cannot hold the states of `local_ranks` ranks in files. Builds DeepSpeed's op if
    needed. Does nothing if the config keeps no states in files."""
    if config.swap_folder is None:
        return
    folder = Path(config.swap_folder)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise broken(PATH, config.swap_folder, "must be a folder that can be written")
    sizes = largest_sizes(config, spec)
    needed, free = (
        local_ranks * sizes.files,
        shutil.disk_usage(folder).free + sum(map(_bytes_of, _folders(config))),
    )
    if needed > free:
        rule = f"must have {needed:,} bytes free for the optimizer states of {local_ranks} ranks, but has {free:,}"
        raise broken(PATH, config.swap_folder, rule)
    _try(config, sizes)


def largest_sizes(config: Config, spec: TransformerSpec) -> SwapSizes:
    """Sizes of the rank that needs the most; the data axis does not matter, and pipe is 1 with ZeRO-3."""
    tensor, d = config.parallel.tensor, config.data_size * config.parallel.context
    ranks = [parameter_sizes(config, spec, Grid.at(rank, 1, d, tensor)) for rank in range(tensor)]
    return max((swap_sizes(config, sizes, d) for sizes in ranks), key=lambda sizes: sizes.files)


def make_swap_folder(config: Config) -> Path | None:
    """A new folder for this rank, whose name identifies the run; None if the config keeps no states in files."""
    if config.swap_folder is None:
        return None
    return Path(tempfile.mkdtemp(prefix=_prefix(config), dir=config.swap_folder))


def remove_swap_folders(config: Config) -> None:
    """Removes the folders that killed starts of this run left on this node."""
    for folder in _folders(config):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(config: Config) -> str:
    """Prefix of the names of a run's folders: runs may share a disk."""
    return f"megalite_states_{hashlib.sha256(str(Path(config.train.run_dir).resolve()).encode()).hexdigest()[:12]}_"


def _folders(config: Config) -> list[Path]:
    return (
        []
        if config.swap_folder is None
        else list(Path(config.swap_folder).glob(f"{_prefix(config)}*"))
    )


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _try(config: Config, sizes: SwapSizes) -> None:
    """Runs `main` in a separate process. Raises ConfigError with the reason if it fails."""
    aio = config.deepspeed.get("aio", {})
    request = {"folder": config.swap_folder, "buffers": sizes.buffers, "aio": aio}
    process = subprocess.Popen(
        [sys.executable, "-m", "megalite.engine.nvme", json.dumps(request)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        print(
            "building DeepSpeed's async_io op: takes minutes, only once",
            file=sys.stderr,
            flush=True,
        )
        output, _ = process.communicate()
    if process.returncode != 0:
        raise _failed(config, sizes, [line.strip() for line in output.splitlines() if line.strip()])


def _failed(config: Config, sizes: SwapSizes, lines: list[str]) -> ConfigError:
    """lines: the output of the process: its last step, then the reason."""
    steps = {
        BUILD: (DEVICE, "nvme", "needs DeepSpeed's async_io op, which does not build here"),
        LOCK: (
            "zero_optimization.sub_group_size", config.zero.sub_group_size,
            f"makes {len(sizes.buffers)} buffers of {max(sizes.buffers):,} bytes per rank: must be within the limit of "
            "locked memory (ulimit -l)",
        ),
        USE: (
            PATH, config.swap_folder,
            f"must be on a disk that supports direct I/O in units of {FILE_UNIT_BYTES} bytes with the section aio",
        ),
    }  # fmt: skip
    last = max((i for i, line in enumerate(lines) if line in steps), default=-1)
    said = lines[last + 1 :]  # an assertion of the op comes last and says least
    why = [line for line in said if "Assertion" not in line] or said or ["no output"]
    path, value, rule = steps[lines[last]] if last >= 0 else (DEVICE, "nvme", "could not be tried")
    return broken(path, value, f"{rule}: {why[-1].removeprefix('error: ')}")


def load_op() -> Any:
    """DeepSpeed's op, built if needed. A rank calls this before DeepSpeed would load it, because `launch.quiet`
    redirects the standard error that the search for libaio needs. Raises RuntimeError, which names what is missing."""
    import deepspeed.ops.op_builder as builders
    import torch
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import CUDA_HOME

    builder: Any = builders.AsyncIOBuilder()  # type: ignore[attr-defined]  # set in a loop
    if not installed_ops.get(builder.name):
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            raise RuntimeError(f"error: no C++ compiler ({compiler})")
        if torch.version.cuda is not None and torch.cuda.is_available() and CUDA_HOME is None:
            raise RuntimeError(
                "error: no CUDA toolkit (nvcc), with which DeepSpeed builds it on machines with GPUs"
            )
        if not builder.is_compatible():
            raise RuntimeError("error: no libaio with its headers (Debian: libaio-dev)")
    return builder.load(verbose=False)


def main(request: dict[str, Any]) -> None:
    """Builds the op, locks a rank's buffers, and reads and writes a file both with the op and as a memory map."""
    import torch
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

    print(BUILD, flush=True)
    try:
        op = load_op()
    except RuntimeError as error:
        lines = str(error).splitlines()
        sys.exit(next((line for line in lines if "error:" in line), lines[0]))
    print(LOCK, flush=True)
    aio = get_aio_config({"aio": request["aio"]})
    aio.pop("use_gds")
    handle, example = op.aio_handle(**aio), torch.zeros(1)
    buffers = [handle.new_cpu_locked_tensor(size // 4, example) for size in request["buffers"]]
    del buffers
    print(USE, flush=True)
    unit = FILE_UNIT_BYTES * aio["intra_op_parallelism"]
    count = (TRIED_BYTES // unit + 1) * unit // 4
    buffer = handle.new_cpu_locked_tensor(count, example)
    with tempfile.NamedTemporaryFile(dir=request["folder"], prefix="megalite_try_") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * count)
        mapped = torch.from_file(file.name, shared=True, size=count, dtype=torch.float32)
        for _ in range(2):  # twice: the second read must not return cached data of the first
            mapped.normal_()
            if (
                handle.async_pread(buffer, file.name, 0)
                or handle.wait() != 1
                or not torch.equal(buffer, mapped)
            ):
                sys.exit("error: async_io read other data than was written to the memory map")
            buffer.normal_()
            if (
                handle.async_pwrite(buffer, file.name, 0)
                or handle.wait() != 1
                or not torch.equal(buffer, mapped)
            ):
                sys.exit("error: the memory map has other data than async_io wrote")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
