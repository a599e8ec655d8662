"""Slurm on the hosts of hosts.py: its controller on h0, and on each a daemon for jobs and one that signs messages."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from tests.launch.hosts import SEARCHED, Cluster, Host
from tests.ranks import REPOSITORY

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}

CONFIG = """
ClusterName=test
SlurmctldHost=h0(10.77.0.1)
SlurmUser=root
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
{nodes}
PartitionName=all Nodes=ALL Default=YES
"""
MUNGED = """
mkdir /run/munge && cd /run/munge
exec munged -F --force --key-file={key} --seed-file=$PWD/seed --pid-file=$PWD/pid
"""


class Slurm:
    """A cluster's hosts as nodes of four CPUs each, which end with the cluster, and a checkout in `folder`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.folder = cluster, cluster.folder / "slurm"
        self.folder.mkdir()
        (self.folder / "launcher").symlink_to(REPOSITORY / "launcher")
        (self.folder / ".venv").symlink_to(sys.prefix)
        nodes = "".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs=4\n" for host in cluster.hosts
        )
        self.config, key = self.folder / "slurm.conf", self.folder / "key"
        self.config.write_text(CONFIG.format(folder=self.folder, nodes=nodes))
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        self.daemons = [self._begin(host, MUNGED.format(key=key)) for host in cluster.hosts]
        self.daemons.append(self._begin(cluster.hosts[0], "exec slurmctld -D"))
        self.daemons += [
            self._begin(host, f"exec slurmd -D -N {host.name}") for host in cluster.hosts
        ]
        self.wait_until(
            lambda: (
                set(self.tell("sinfo", "-h", "-N", "-o", "%T", check=False).split()) == {"idle"}
            ),
            30,
        )

    def submit(self, *words: str) -> "Job":
        """sbatch's options, launcher/slurm.sh and its arguments."""
        return Job(
            self,
            self.tell("sbatch", "--parsable", f"--output={self.folder}/output%j", *words).strip(),
        )

    def tell(self, *command: str, check: bool = True) -> str:
        """What a command on h0 says."""
        words = self.cluster.hosts[0].inside(self.folder, *command)
        done = subprocess.run(words, env=self._environment(), text=True, capture_output=True)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait_until(
        self, condition: Callable[[], bool], seconds: float, job: "Job | None" = None
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                job.text if job else (self.folder / "daemons").read_text()
            )
            time.sleep(0.1)

    def _begin(self, host: Host, script: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "daemons").open("a") as file:
            command = host.inside(self.folder, "bash", "-c", script)
            return subprocess.Popen(
                command, env=self._environment(), stdout=file, stderr=file, start_new_session=True
            )

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "PATH": SEARCHED,
            "SLURM_CONF": str(self.config),
            "PYTHONPATH": str(REPOSITORY),
        }


class Job:
    """One that was submitted."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm, self.number = slurm, number

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm says of it: JobState, ExitCode, Restarts and more."""
        words = self.slurm.tell("scontrol", "show", "-o", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def text(self) -> str:
        output = self.slurm.folder / f"output{self.number}"
        return f"{self.facts}\n{output.read_text() if output.exists() else ''}"

    @property
    def ranks(self) -> list[psutil.Process]:
        """Its ranks in the order of hosts."""
        processes = [process for host in self.slurm.cluster.hosts for process in host.processes()]
        # The process of srun has these words too.
        return [p for p in processes if p.cmdline()[1:3] == ["-u", "launcher/pretrain.py"]]

    def wait_for(self, state: str, seconds: float = 60) -> dict[str, str]:
        """Its facts once it is in a state."""
        self.slurm.wait_until(lambda: self.facts["JobState"] == state, seconds, self)
        return self.facts
