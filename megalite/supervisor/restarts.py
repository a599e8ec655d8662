"""`launcher/run.py`: stock `deepspeed` plus what it lacks: signals, exit codes, restarts, no processes left behind.

python launcher/run.py --hostfile FILE --restarts 3 launcher/pretrain.py --deepspeed_config FILE [KEY=VALUE …]
megalite run --hostfile FILE --restarts 3 pretrain --deepspeed_config FILE [KEY=VALUE …]
"""

import argparse
import re
import signal
import sys
from pathlib import Path

from megalite.config.section import nearest
from megalite.errors import ConfigError, MegaliteError, UserError
from megalite.ranks.arguments import MOST_PORT, ArgumentParser, at_least, positive
from megalite.ranks.run_program import program_name
from megalite.ranks.signals import EXIT_BASE, RESUME, print_interrupted
from megalite.supervisor.attempt import (
    STOP_SECONDS,
    THIS,
    Attempt,
    HostsLost,
    LaunchedProgram,
    Outcome,
    ReceivedSignals,
    name_of_run,
)
from megalite.supervisor.fewer import ProgramConfig
from megalite.supervisor.hostfile import read_hostfile
from megalite.supervisor.remote import check_bare, secrets, variables

_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:-]*")
_CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
RANK_COMMANDS = ("pretrain", "generate", "evaluate")
"""Commands of `megalite` that run on every rank."""
# Options of deepspeed: the program is `python -m megalite`.
_MODULE = ["--module", "--no_local_rank"]
_PASSED_ON = ("bind_core_list", "log_level", "enable_each_rank_log", "master_port", "ssh_port")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


class StartsFailed(MegaliteError):
    """All starts have failed."""


def main(arguments: list[str]) -> int:
    """Runs a program on ranks until it is done; returns 0, 1, 2, or 128 + N after signal N."""
    options = _parse(arguments)
    over_ssh = options.hostfile is not None
    hosts: dict[str, int] = {THIS: options.num_gpus}
    if over_ssh:
        hosts = read_hostfile(options.hostfile)
    if options.num_nodes:
        if options.num_nodes > len(hosts):
            count = "1 host" if len(hosts) == 1 else f"{len(hosts)} hosts"
            raise ConfigError(f"--num_nodes: {options.num_nodes}: the hostfile has {count}")
        hosts = dict([*hosts.items()][: options.num_nodes])
    if over_ssh:
        if options.num_gpus:
            hosts = {host: options.num_gpus for host in hosts}
        check_bare()
        variables({})
        if unsent := secrets():
            why = "not sent to other hosts, where every user could read them in a command line (docs/clusters.md)"
            _print(f"{why}: {', '.join(unsent)}")
    code = Supervisor(options, hosts).run()
    if code == EXIT_BASE + signal.SIGINT:
        print_interrupted(RESUME)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        description="Start a program on ranks with deepspeed, and supervise it."
    )
    parser.add_argument(
        "-H", "--hostfile", metavar="FILE", help="lines of NAME slots=N; all are reached by ssh"
    )
    parser.add_argument(
        "--num_gpus", type=at_least(1), metavar="N", help="ranks on this machine, or on each host"
    )
    parser.add_argument(
        "--num_nodes",
        type=at_least(1),
        metavar="N",
        help="use only the first N hosts of the hostfile",
    )
    parser.add_argument(
        "--restarts",
        type=at_least(0),
        default=0,
        metavar="N",
        help="restarts after failures",
    )
    parser.add_argument(
        "--grace_seconds",
        type=positive,
        default=STOP_SECONDS,
        metavar="S",
        help="seconds after a signal until the remaining ranks are killed: time for the step and the last "
        "checkpoint",
    )
    parser.add_argument(
        "--master_addr", help="an address of the first host that the others can reach"
    )
    parser.add_argument(
        "--master_port",
        type=at_least(1, MOST_PORT),
        metavar="P",
        help="a free port on the first host",
    )
    parser.add_argument(
        "--ssh_port", type=at_least(1, MOST_PORT), metavar="P", help="sshd's port on the hosts"
    )
    for name in ("--bind_cores_to_rank", "--quiet"):
        parser.add_argument(name, action="store_true", help="deepspeed's")
    parser.add_argument("--bind_core_list", metavar="A-B,…", help="deepspeed's")
    parser.add_argument("--log_level", choices=_LOG_LEVELS, help="deepspeed's")
    parser.add_argument("--enable_each_rank_log", metavar="FOLDER", help="deepspeed's")
    parser.add_argument(
        "program",
        help=f"{', '.join(RANK_COMMANDS)}, or a script that runs on every rank",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the program")
    return parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line. Raises ConfigError for options that are malformed or do not go together."""
    options = _parser().parse_args(arguments)
    if options.hostfile is None and options.num_gpus is None:
        raise ConfigError("--hostfile or --num_gpus: missing: one of them is required")
    if options.hostfile is None:
        for name in ("num_nodes", "ssh_port", "master_addr"):
            if (value := getattr(options, name)) is not None:
                raise ConfigError(f"--{name}: {value}: only with --hostfile")
    binds = options.bind_cores_to_rank or options.bind_core_list is not None
    if options.hostfile is not None and binds:
        rule = "only with --num_gpus: deepspeed does not pass them to hosts"
        raise ConfigError(f"--bind_cores_to_rank, --bind_core_list: {rule}")
    folder = options.enable_each_rank_log
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"--enable_each_rank_log: {folder}: must be a folder")
    _check_program(options.program)
    for name, form, rule in (
        ("master_addr", _ADDRESS, "must be a name or an address"),
        ("bind_core_list", _CORES, "must be cores such as 0-3,8"),
    ):
        value = getattr(options, name)
        if value is not None and not form.fullmatch(value):
            raise ConfigError(f"--{name}: {value!r}: {rule}")
    return options


def _check_program(program: str) -> None:
    """Raises ConfigError unless it is a command for ranks or a script."""
    if program in RANK_COMMANDS or Path(program).is_file():
        return
    *others, last = RANK_COMMANDS
    rule = f"must be {', '.join(others)} or {last}, or an existing script"
    near = nearest(program, RANK_COMMANDS)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"program: {program}: {rule}{hint}")


class Supervisor:
    """Starts a program, and restarts it after failures. hosts: ranks by host."""

    def __init__(self, options: argparse.Namespace, hosts: dict[str, int]) -> None:
        self.options, self.full, self.name = options, hosts, name_of_run()
        self.signals = ReceivedSignals()

    def run(self) -> int:
        self.signals.listen()
        starts = 1 + self.options.restarts
        for start in range(1, starts + 1):
            outcome = self._start(start == 1)
            if outcome.code in (0, UserError.exit_code) or outcome.code > EXIT_BASE:
                return outcome.code
            if start < starts:
                _print(f"{outcome.who}; restarting (attempt {start + 1} of {starts})")
        raise StartsFailed(f"{outcome.who}; attempt {starts} of {starts} failed, no more restarts")

    def _start(self, first: bool) -> Outcome:
        """Starts on all hosts; a restart may use only those that answer, if the training stays the same."""
        hosts, overrides = self.full, list[str]()
        while True:
            try:
                return Attempt(self._program(overrides), hosts, self.name, self.signals).run()
            except HostsLost as error:
                left = {host: slots for host, slots in hosts.items() if host not in error.hosts}
                if first or not left:
                    raise
                hosts, overrides = self._fit(left, str(error))

    def _program(self, overrides: list[str]) -> LaunchedProgram:
        options, given = list[str](), vars(self.options)
        for name in ("bind_cores_to_rank", "quiet"):
            if given[name]:
                options.append(f"--{name}")
        for name in _PASSED_ON:
            if given[name] is not None:
                options += [f"--{name}", str(given[name])]
        words = [self.options.program, *self.options.arguments, *overrides]
        if self.options.program in RANK_COMMANDS:
            options += _MODULE
            words = ["megalite", *words]
        return LaunchedProgram(
            options,
            words,
            self.options.hostfile is not None,
            self.options.ssh_port,
            self.options.master_addr,
            self.options.grace_seconds,
        )

    def _fit(self, left: dict[str, int], why: str) -> tuple[dict[str, int], list[str]]:
        try:
            hosts, overrides = ProgramConfig(self.options.arguments).fit(self.full, left)
        except ConfigError as error:
            raise StartsFailed(
                f"{why}; cannot continue on {', '.join(left)} alone: {error}"
            ) from error
        count = sum(hosts.values())
        ranks = "1 rank" if count == 1 else f"{count} ranks"
        _print(f"{why}; continuing with {ranks} on {', '.join(hosts)}")
        return hosts, overrides


def _print(line: str) -> None:
    print(f"{program_name()}: {' '.join(line.split())}", file=sys.stderr, flush=True)
