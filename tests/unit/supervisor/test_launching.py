"""Parts of launcher/run.py that start no ranks: hostfiles, variables sent to hosts, fewer hosts, the guard."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megalite.errors import ConfigError
from megalite.ranks.launch import PASSED_ON, VISIBLE, _set_environment
from megalite.ranks.rank_info import RankInfo
from megalite.ranks.signals import command_of, killed_ranks, record_exit
from megalite.supervisor import attempt
from megalite.supervisor.attempt import Attempt, ReceivedSignals, name_of_run
from megalite.supervisor.attempt import LaunchedProgram as AttemptProgram
from megalite.supervisor.fewer import ProgramConfig
from megalite.supervisor.host_guard import MARK
from megalite.supervisor.host_guard import _processes as guarded_processes
from megalite.supervisor.hostfile import read_hostfile
from megalite.supervisor.remote import harmless_environment, secrets, variables
from megalite.supervisor.restarts import main
from megalite.topology.hosts import crossing_hosts


def test_a_hostfile_is_names_and_slots(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("# a cluster\n\nworker-1 slots=8\n  # one more\n10.0.0.2\tslots=4 # half\n")
    assert read_hostfile(str(file)) == {"worker-1": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch x slots=1", "-w slots=1", "a;b slots=1", "$(touch x) slots=1", "`touch x` slots=1",
        "../x slots=1", "a\rb slots=1", "h[1-3] slots=1", "a,b slots=1", "u@h slots=1", "h slots=0", "h slots=-1",
        "h slots=1; x", "h", "h slots=1 \x0b", "^file slots=1", "h%n slots=1", "h\u2028 slots=1", "h- slots=1",
    ],
)  # fmt: skip
def test_any_other_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "hostfile"
    file.write_text(f"good slots=1\n{line}\n", newline="")
    with pytest.raises(ConfigError) as error:
        read_hostfile(str(file))
    assert str(error.value).startswith(f"{file}: line 2: {line!r}: must be NAME slots=N")
    assert len(str(error.value).splitlines()) == 1


def test_mistakes_of_the_command_line_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hostfile"
    program = ["launcher/pretrain.py", "--deepspeed_config", "x"]
    cases = {
        "--hostfile or --num_gpus: missing": program,
        f"--hostfile: {file}: cannot be read": ["--hostfile", str(file), *program],
        "--restarts: -1": ["--num_gpus", "1", "--restarts", "-1", *program],
        "--launcher_args": ["--num_gpus", "1", "--launcher_args", "x", *program],
        "--master_addr: 'a;x': must be a name": [
            "--hostfile",
            "x",
            "--master_addr",
            "a;x",
            *program,
        ],
        "--bind_core_list: '1;x': must be cores": [
            "--num_gpus",
            "1",
            "--bind_core_list",
            "1;x",
            *program,
        ],
        "--bind_cores_to_rank.*only with --num_gpus": [
            "--hostfile",
            "x",
            "--bind_cores_to_rank",
            *program,
        ],
        "--master_addr: h: only with --hostfile": [
            "--num_gpus",
            "1",
            "--master_addr",
            "h",
            *program,
        ],
        "--num_nodes: 2: only with --hostfile": ["--num_gpus", "1", "--num_nodes", "2", *program],
        "--ssh_port: 2: only with --hostfile": ["--num_gpus", "1", "--ssh_port", "2", *program],
        "program: pretran: must be pretrain, generate or evaluate, or an existing script; did you mean pretrain.$": [
            "--num_gpus",
            "2",
            "pretran",
        ],
        "program: x/none.py: must be pretrain, .* or an existing script$": [
            "--num_gpus",
            "2",
            "x/none.py",
        ],
        "--master_port: 70000: must be an integer of at least 1 and at most 65535": [
            *["--num_gpus", "1", "--master_port", "70000"],
            *program,
        ],
        "--enable_each_rank_log: .*test_launching.py: must be a folder": [
            *["--num_gpus", "1", "--enable_each_rank_log", __file__],
            *program,
        ],
        "--log_level: invalid choice": ["--num_gpus", "1", "--log_level", "$(x)", *program],
    }
    for said, arguments in cases.items():
        with pytest.raises(ConfigError, match=said):
            main(arguments)
    file.write_text("h slots=1\nh slots=2\n")
    with pytest.raises(ConfigError, match="line 2.*must be listed only once"):
        main(["--hostfile", str(file), *program])
    file.write_text("h slots=1\n")
    with pytest.raises(ConfigError, match="--num_nodes: 4: the hostfile has 1 host$"):
        main(["--hostfile", str(file), "--num_nodes", "4", *program])
    monkeypatch.setenv("HF_LINES", "a\nb")
    with pytest.raises(ConfigError, match="environment: HF_LINES"):
        main(["--hostfile", str(file), *program])
    monkeypatch.delenv("HF_LINES")
    (tmp_path / "a b/launcher").mkdir(parents=True)
    (tmp_path / "a b/launcher/pretrain.py").write_text("")
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(ConfigError, match="the folder .*a b"):
        main(["--hostfile", str(file), *program])


def test_variables_are_those_of_libraries_and_of_deepspeeds_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GLOO_OWN", "$(x)")
    monkeypatch.setenv("SECRET", "x")
    (tmp_path / ".deepspeed_env").write_text("OWN=a=b c\nGLOO_OWN=file\n")
    found = variables({"MEGALITE_LAUNCH": "y"})
    assert (found["OWN"], found["GLOO_OWN"], found["MEGALITE_LAUNCH"]) == ("a=b c", "file", "y")
    assert "SECRET" not in found and found["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)


def test_a_user_without_a_home_has_no_file_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError("uid not found")))
    assert "PYTHONPATH" in variables({})


@pytest.mark.parametrize(
    ("name", "value", "sent"),
    [
        ("HF_TOKEN", "x", False), ("HF_TOKEN_PATH", "/x", True), ("MLFLOW_TRACKING_PASSWORD", "x", False),
        ("MLFLOW_TRACKING_URI", "https://me:x@there", False), ("MLFLOW_TRACKING_URI", "https://there:80/a@b", True),
        ("TOKENIZERS_PARALLELISM", "false", True), ("MLFLOW_S3_ACCESS_KEY_2", "x", False), ("HF_TOKEN", "", True),
    ],
)  # fmt: skip
def test_secrets_are_not_sent_on(
    name: str, value: str, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {name: value})
    assert (name in variables({})) == (name in harmless_environment()) == sent
    assert secrets() == ([] if sent else [name])


def _another_users(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of another user's")
    os.chown(folder, 65534, 65534)


SPOILED = {
    "a link": lambda path: path.symlink_to(path.parent),
    "a file": lambda path: path.touch(),
    "open to the group": lambda path: path.mkdir(mode=0o750),
    "another user's": lambda path: (path.mkdir(mode=0o700), _another_users(path)),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_messages_folder_that_another_user_can_reach_is_not_used(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, victim = tmp_path / "megalite-x-1", tmp_path / "rank_0"
    SPOILED[how](folder)
    monkeypatch.setenv("MEGALITE_LAUNCH", str(folder))
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "killed_3").touch()
    record_exit(1)
    assert (
        not victim.exists()
        and (not folder.is_dir() or not [*folder.glob("rank_*")])
        and not killed_ranks()
    )
    guard = subprocess.run(
        [sys.executable, "-m", "megalite.supervisor.host_guard", str(folder)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert guard.stdout.startswith(f"{MARK}refused {folder}: ") and guard.stdout.count("\n") == 1, (
        guard
    )


def test_no_two_starts_share_a_name() -> None:
    program, run = AttemptProgram([], [], False, None, None), name_of_run()
    names = {Attempt(program, {}, run, ReceivedSignals()).name for _ in range(3)}
    assert len(names) == 3 and all(name.startswith(f"{run}-") for name in names)


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(attempt, "time", SimpleNamespace(monotonic=lambda: self.now))


def attempt_of(ranks: int, **keys: Any) -> Attempt:
    """An attempt whose ranks are all running."""
    program = AttemptProgram([], [], False, None, None, **keys)
    made = Attempt(program, {"localhost": ranks}, name_of_run(), ReceivedSignals())
    made.running = dict.fromkeys(range(ranks), mock.Mock())
    return made


@pytest.mark.parametrize("grace", [120.0, 7.0])
def test_the_grace_period_after_a_signal_is_given_once(
    monkeypatch: pytest.MonkeyPatch, grace: float
) -> None:
    """`deepspeed` itself exits shortly before the time is over, but its ranks do not."""
    clock, deepspeed = Clock(monkeypatch), mock.Mock()
    made = attempt_of(2, grace_seconds=grace)
    made.stopped_at = clock.now
    deepspeed.poll.return_value = None
    clock.now += grace - 3
    assert not made._is_over(deepspeed)
    deepspeed.poll.return_value = 1
    assert not made._is_over(deepspeed)
    clock.now += 2.5
    assert not made._is_over(deepspeed) and made.orphaned
    clock.now += 1
    assert made._is_over(deepspeed)


def test_a_remote_shell_that_stays_does_not_delay_a_finished_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, shell = Clock(monkeypatch), mock.Mock()
    shell.poll.return_value = None
    made = attempt_of(2)
    made._down(0, "0")
    made._down(1, "0")
    clock.now += 29
    assert not made._is_over(shell)
    clock.now += 2
    assert made._is_over(shell)
    assert made._outcome(None, {}).code == 0


def test_all_guards_are_released_within_one_limit(tmp_path: Path) -> None:
    """The guards do not respond, like connections to unreachable hosts."""
    made = attempt_of(0)
    begin = time.monotonic()
    with mock.patch.object(attempt, "python_module", lambda *words: ["sleep", "60"]):
        made.guards = [
            attempt.HostGuard(attempt.THIS, "x", None, tmp_path / "said") for _ in range(5)
        ]
    made._detach_all()
    assert time.monotonic() - begin < 3
    assert all(guard.process.poll() is not None for guard in made.guards)


def test_the_guard_does_not_see_other_users_processes() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can start another user's process")
    environment = {"MEGALITE_LAUNCH": "/tmp/megalite-mine-1", "RANK": "0"}
    other = subprocess.Popen(["sleep", "60"], env=environment, user=65534)
    try:
        assert not guarded_processes("/tmp/megalite-mine-1")
        os.kill(other.pid, 0)
    finally:
        other.kill()
        other.wait()


def test_fewer_hosts_keep_the_global_batch(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "megalite": {
            "model": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 4,
                      "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64},
            "parallel": {"tensor": 2},
            "data": {"sequence_length": 32, "train": ["x"]},
            "train": {"steps": 1, "run_dir": "x"},
        },
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    full = {"a": 4, "b": 4, "c": 4, "d": 4}
    program = ProgramConfig([f"--deepspeed_config={path}", "megalite.train.seed=3"])
    assert program.fit(full, full) == (full, [])
    batch = [
        "train_batch_size=48",
        "train_micro_batch_size_per_gpu=2",
        "gradient_accumulation_steps=null",
    ]
    assert program.fit(full, {"a": 4, "c": 4, "d": 4}) == ({"a": 4, "c": 4, "d": 4}, batch)
    assert program.fit(full, {"d": 4}) == ({"d": 4}, batch)
    # 5 data ranks of micro-batch 2 do not divide 48, 4 do.
    assert program.fit(full, {"a": 4, "b": 4, "c": 2}) == ({"a": 4, "b": 4}, batch)
    with pytest.raises(ConfigError, match="world size: 1: must be a multiple"):
        program.fit(full, {"a": 1})
    divided = ProgramConfig([f"--deepspeed_config={path}", "megalite.parallel.context=2"])
    fewer = ["train_batch_size=24", *batch[1:]]
    assert divided.fit(full, {"a": 4, "b": 4, "c": 3}) == ({"a": 4, "b": 4}, fewer)
    with pytest.raises(ConfigError, match="--deepspeed_config: missing"):
        ProgramConfig(["--checkpoint", "x"])


def test_a_tensor_axis_across_hosts_is_named() -> None:
    assert crossing_hosts(["a", "a", "b", "b"], 2) is None
    line = crossing_hosts(["a", "a", "a", "b", "b", "b"], 2)
    assert line is not None and line.startswith(
        "megalite.parallel.tensor 2: ranks 2 to 3 are on a, b: "
    )


def test_the_guard_knows_ranks_by_their_environment(tmp_path: Path) -> None:
    """The rank has a child and an orphaned descendant; it has no handler for SIGUSR1."""
    folder = tmp_path / "megalite-x-1"
    code = "import os, subprocess; os.system('sleep 60 & echo $!; exit'); subprocess.run(['cat'])"
    guard = subprocess.Popen(
        [sys.executable, "-u", "-m", "megalite.supervisor.host_guard", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert guard.stdin is not None and guard.stdout is not None

    def said() -> str:
        assert guard.stdout is not None
        _, mark, line = guard.stdout.readline().partition(MARK)
        assert mark
        return line.strip()

    assert said().startswith("ready 127.0.0.1 ")
    environment = os.environ | {"MEGALITE_LAUNCH": str(folder), "RANK": "7"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rank = subprocess.Popen([sys.executable, "-c", "input();" + code], env=environment, **pipes)
    assert said() == f"up 7 {rank.pid}"
    assert rank.stdin is not None and rank.stdout is not None
    print(file=rank.stdin, flush=True)
    orphan = int(rank.stdout.readline())
    guard.stdin.write(f"signal {signal.SIGUSR1.value}\n")
    (folder / "rank_9").write_text("0")  # a rank that exited before it was noticed
    guard.stdin.close()  # the supervisor is gone: SIGTERM to the ranks
    assert [said(), said(), said(), guard.stdout.read()] == ["down 7 -", "down 9 0", "over", ""]
    assert rank.wait(5) == -15 and guard.wait(5) == 0 and not folder.exists()
    assert not command_of(orphan)


def test_nohup_is_heeded() -> None:
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals = ReceivedSignals()
        signals.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.stop == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("chosen", ["4,5", "GPU-8c2f6a1e,GPU-9d", "", None])
def test_the_users_gpus_and_a_free_port_are_passed_on(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deepspeed --num_gpus 2` would take GPUs 0 and 1, and the port of any other run on this machine."""
    monkeypatch.delenv(VISIBLE, raising=False)
    if chosen is not None:
        monkeypatch.setenv(VISIBLE, chosen)
    with mock.patch.object(attempt.subprocess, "Popen") as started:
        for options in ([], ["--master_port", "7"]):
            program = AttemptProgram(options, ["x.py"], False, None, None)
            Attempt(program, {"localhost": 2}, "name", ReceivedSignals())._start(tmp_path)
    ports = []
    for call in started.call_args_list:
        words, environment = call.args[0], call.kwargs["env"]
        assert environment.get(PASSED_ON) == chosen
        ports.append(words[words.index("--master_port") + 1])
    assert ports[0] not in ("29500", "7") and ports[1] == "7"
    # What deepspeed's launcher then gives each rank, and what the rank makes of it.
    with mock.patch.dict(os.environ, call.kwargs["env"] | {VISIBLE: "0,1"}):
        _set_environment(RankInfo(0, 2, 0, 2))
        assert os.environ[VISIBLE] == ("0,1" if chosen is None else chosen)
        assert PASSED_ON not in os.environ
