"""`tools/doctor.py`: checks the hosts of a run before it starts.

python tools/doctor.py --hostfile FILE [--deepspeed_config FILE [KEY=VALUE …]]
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megalite.config import Config, Parallel, check_model, load_config
from megalite.doctor import axis_rates
from megalite.doctor.findings import CLOCK_SECONDS, findings
from megalite.doctor.gpus import line as gpu_line
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.ranks.arguments import MOST_PORT, ArgumentParser, at_least
from megalite.supervisor.attempt import (
    THIS,
    Attempt,
    HostsLost,
    LaunchedProgram,
    ReceivedSignals,
    name_of_run,
)
from megalite.supervisor.hostfile import read_hostfile
from megalite.supervisor.remote import check_bare, python_module, ssh, variables
from megalite.topology.hosts import crossing_hosts

PROBE_SECONDS = 120
PORT = 29500  # DeepSpeed's


def main(arguments: list[str]) -> int:
    """Prints a line for each finding; returns 0 if there are none, otherwise 1. Raises UserError for the user's
    mistakes."""
    parser = ArgumentParser(description="Check the hosts of a run before it starts.")
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="lines of NAME slots=N")
    parser.add_argument(
        "--num_gpus",
        type=at_least(1),
        metavar="N",
        help="without a hostfile: ranks on this machine",
    )
    parser.add_argument(
        "--deepspeed_config",
        metavar="FILE",
        help="the run's JSON config: its files and grid are checked",
    )
    parser.add_argument(
        "--master_port",
        type=at_least(1, MOST_PORT),
        default=PORT,
        metavar="P",
        help="the run's port",
    )
    parser.add_argument(
        "--ssh_port", type=at_least(1, MOST_PORT), metavar="P", help="sshd's port on the hosts"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for launcher/pretrain.py"
    )
    options = parser.parse_args(arguments)
    if (options.hostfile is None) == (options.num_gpus is None):
        raise ConfigError("--hostfile or --num_gpus: missing: one of them is required")
    over_ssh = options.hostfile is not None
    slots: dict[str, int] = {THIS: options.num_gpus}
    if over_ssh:
        slots = read_hostfile(options.hostfile)
        check_bare()
        variables({})
    config = _config(options.deepspeed_config, options.overrides, sum(slots.values()))
    count = 0
    for line in _lines(options, slots, config):
        print(line, flush=True)
        count += 1
    hosts, ranks = _counted(len(slots), "host"), _counted(sum(slots.values()), "rank")
    print(f"{hosts}, {ranks}: {_counted(count, 'finding') if count else 'all well'}")
    return 1 if count else 0


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _config(path: str | None, overrides: list[str], world_size: int) -> Config | None:
    if path is None:
        if overrides:
            raise ConfigError(f"{overrides[0]}: needs --deepspeed_config, whose keys it sets")
        return None
    config = load_config(path, overrides).resolve(world_size)
    check_model(config, read_spec(config.model))
    return config


def _lines(options: Any, slots: dict[str, int], config: Config | None) -> Iterator[str]:
    """The findings."""
    folders = [] if config is None else [config.train.run_dir]
    paths = _paths(options.deepspeed_config, config)
    wanted = {"paths": paths, "folders": folders, "port": options.master_port}
    with ThreadPoolExecutor(len(slots)) as pool:
        seen = pool.map(lambda host: _probe(host, wanted, options.ssh_port), slots)
        probes = dict(zip(slots, seen, strict=True))
    failed = {host: seen for host, seen in probes.items() if isinstance(seen, str)}
    for host, said in failed.items():
        rule = f"`ssh {host} true` must work without a prompt, and this folder must exist there"
        yield f"{host}: no answer: {said}: {rule}"
    answered = {host: seen for host, seen in probes.items() if not isinstance(seen, str)}
    for host, seen in answered.items():
        if seen["gpu_facts"] and isinstance(seen["gpu_facts"], list):
            print(f"{host}: {gpu_line(seen['gpu_facts'])}", flush=True)
    if answered:
        yield from findings(answered, slots, options.master_port, _checkpoint_bytes(config))
    parallel = Parallel.model_validate({}) if config is None else config.parallel
    hosts = [host for host, count in slots.items() for _ in range(count)]
    line = crossing_hosts(hosts, parallel.tensor)
    if line is not None:
        yield line
    # Ranks cannot connect without a host, or without the first one's port.
    if not failed and next(iter(answered.values()))["port_free"]:
        yield from _try_axes(options, slots, config, parallel)


def _checkpoint_bytes(config: Config | None) -> int:
    """Bytes of all checkpoints that a run keeps at a time: weights and two moments in fp32. There is one more than
    `keep_checkpoints` while another is being written."""
    if config is None:
        return 0
    kept = (config.train.keep_checkpoints or 1) + 1
    return 12 * read_spec(config.model).num_parameters * kept


def _try_axes(
    options: Any, slots: dict[str, int], config: Config | None, parallel: Parallel
) -> Iterator[str]:
    """Runs axis_rates.py on all ranks; a finding if it fails."""
    axes_sizes = (parallel.pipe, parallel.tensor, parallel.context, parallel.expert)
    words = [axis_rates.__file__, *map(str, axes_sizes)]
    if config is not None and config.train.calibration is not None:
        words.append(config.train.calibration)
    deepspeeds = ["--master_port", str(options.master_port), "--quiet"]
    over_ssh = options.hostfile is not None
    program = LaunchedProgram(deepspeeds, words, over_ssh, options.ssh_port, None)
    signals = ReceivedSignals()
    signals.listen()
    try:
        outcome = Attempt(program, slots, name_of_run(), signals).run()
    except HostsLost as error:
        yield str(error)
        return
    if signals.stop == signal.SIGINT:
        raise KeyboardInterrupt
    if outcome.code:
        yield f"a collective of each axis: {outcome.who or 'failed'}: see the lines above"


def _probe(host: str, wanted: dict[str, Any], port: int | None) -> dict[str, Any] | str:
    """A host's probe, with `clock_error`; or the reason why there is none."""
    words = python_module("megalite.doctor.probe", json.dumps(wanted))
    command = words if host == THIS else ssh(host, words, port)
    before = time.time()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"no output within {PROBE_SECONDS} s"
    after = time.time()
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    try:
        seen = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return "its output is not the probe's"
    # Its clock was read between `before` and `after`.
    early = seen["time"] - after
    late = seen["time"] - before
    error = max(early, 0.0) or min(late, 0.0)
    seen["clock_error"] = error if abs(error) > CLOCK_SECONDS else 0.0
    return seen


def _paths(config_path: str | None, config: Config | None) -> list[str]:
    """Files that must be the same on every host."""
    if config is None or config_path is None:
        return []
    paths = [config_path]
    for source in [*config.data.train, *config.data.valid]:
        paths += [f"{source.path}.idx", f"{source.path}.bin"]
    model = config.document.megalite.model
    for folder in (config.data.tokenizer, model):
        if isinstance(folder, str):
            paths += map(str, sorted(Path(folder).glob("*.json")))
    return paths
