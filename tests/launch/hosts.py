"""Hosts for tests of hostfile runs: namespaces of this machine, each with its own network, name, processes and sshd.

A cluster is one tree of processes in namespaces without names: a switch (a bridge) and its hosts h0, h1, … at
10.77.0.1, 10.77.0.2, …, which share the file system as on a cluster. Keys, configuration and name tables lie in a
temporary folder and are mounted over /etc's in the hosts alone. When its first process ends, or whoever made it, the
kernel ends all the others and takes links and mounts down, so that a killed test run leaves nothing. Root alone can
do this.
"""

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megalite.ranks.signals import command_of

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "ip": "iproute2"}
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NEW = ["--net", "--uts", "--mount", "--pid"]  # namespaces; the rest is shared
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

SWITCH = """
set -e
cd "$(dirname "$0")"
ip link add br0 type bridge
ip link set br0 up
for i in $(seq 0 $(($1 - 1))); do
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash host.sh $i &
    while [ "$(readlink /proc/$!/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
    ip link add v$i type veth peer name eth0 netns $!
    ip link set v$i master br0 up
    nsenter -t $! -n ip addr add 10.77.0.$((i + 1))/24 dev eth0
    nsenter -t $! -n ip link set eth0 up
    nsenter -t $! -n ip link set lo up
done
touch made
wait
"""

HOST = """
set -e
hostname h$1
mount --bind hosts /etc/hosts
mount --bind nsswitch.conf /etc/nsswitch.conf
mount --bind ssh /etc/ssh
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
until ip addr show dev eth0 2>/dev/null | grep -q 10.77.0; do sleep 0.01; done
"$(command -v sshd)" -D -e -f ssh/sshd_config
"""

SSHD = """
HostKey {folder}/ssh/key
AuthorizedKeysFile {folder}/ssh/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
MaxSessions 100
ClientAliveInterval 5
ClientAliveCountMax 3
LogLevel ERROR
"""

SSH = """
IdentityFile {folder}/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@functools.cache
def require_hosts() -> None:
    """Skips where hosts cannot be made: not root, no namespaces, or packages that are missing and do not install."""
    if os.geteuid() != 0:
        pytest.skip("hosts are namespaces, which only root makes")
    probe = subprocess.run(
        ["unshare", *NEW, "--fork", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    if probe.returncode:
        pytest.skip(
            f"this machine does not let namespaces be made: {probe.stderr.decode().strip()}"
        )
    require(**PACKAGES)


@functools.cache
def require(**packages: str) -> None:
    """Skips where programs are missing and Debian's packages of them, by program, do not install."""
    missing = [
        package for program, package in packages.items() if not shutil.which(program, path=SEARCHED)
    ]
    if missing and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
        for command in (["apt-get", "update", "-q"], install):
            subprocess.run(command, env=environment, capture_output=True, timeout=240)
        missing = [
            package
            for program, package in packages.items()
            if not shutil.which(program, path=SEARCHED)
        ]
    if missing:
        pytest.skip(f"needs Debian's {', '.join(missing)}, which could not be installed")


class Host:
    """One host. init: its first process, as this machine sees it, made when its sshd listens."""

    def __init__(self, number: int, init: psutil.Process) -> None:
        self.number, self.name, self.address = number, f"h{number}", f"10.77.0.{number + 1}"
        self.init = init
        self.own = {init, *init.children()}  # not whatever comes to have this parent: orphans do

    def inside(self, folder: Path, *command: str) -> list[str]:
        """A command line that runs `command` on the host, in a folder."""
        return ["nsenter", "-t", str(self.init.pid), *NEW, f"--wd={folder}", *command]

    def processes(self) -> list[psutil.Process]:
        """All that run on it, those of its own set-up left out."""
        found = []
        try:
            namespace = os.readlink(f"/proc/{self.init.pid}/ns/pid")
        except OSError:
            return found  # the host is gone, and all that ran on it
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.readlink(f"/proc/{process.pid}/ns/pid") == namespace:
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return [process for process in found if process not in self.own]


class Cluster:
    """So many hosts; `close` removes them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        ssh = folder / "ssh"
        ssh.mkdir()
        names = "".join(f"10.77.0.{i + 1} h{i}\n" for i in range(count))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        # No DNS, which would be asked for each peer of torch's store, and not answer.
        (folder / "nsswitch.conf").write_text(
            "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"
        )
        (folder / "switch.sh").write_text(SWITCH)
        (folder / "host.sh").write_text(HOST)
        (ssh / "sshd_config").write_text(SSHD.format(folder=folder))
        (ssh / "ssh_config").write_text(SSH.format(folder=folder))
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "key")], check=True
        )
        self.output = folder / "output"
        script = ["bash", str(folder / "switch.sh"), str(count)]
        with self.output.open("w") as file:
            self.top = subprocess.Popen(
                ["unshare", *NEW, "--fork", "--kill-child", "--mount-proc", *script],
                env=os.environ | {"PATH": SEARCHED}, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        try:
            self.hosts = self._wait(count)
        except BaseException:
            self.close()
            raise

    def _wait(self, count: int) -> list[Host]:
        deadline = time.monotonic() + 30
        while True:
            tree = psutil.Process(self.top.pid).children(recursive=True)
            commands = {process: command_of(process.pid).split(b"\0")[:-1] for process in tree}
            inits = {
                int(words[2]): p
                for p, words in commands.items()
                if words[:2] == [b"bash", b"host.sh"]
            }
            listening = [
                words for words in commands.values() if words and words[0].startswith(b"sshd: ")
            ]
            if len(inits) == len(listening) == count and (self.folder / "made").exists():
                return [Host(i, inits[i]) for i in range(count)]
            assert self.top.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def hostfile(self, slots: int = 1, hosts: int | None = None) -> Path:
        """The hosts with so many slots each."""
        path = self.folder / f"hostfile{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts[:hosts]))
        return path

    def link(self, host: Host, state: str) -> None:
        """Takes a host's link "down" or "up", at the switch."""
        self._at_the_switch("ip", "link", "set", f"v{host.number}", state)

    def limit(self, rate: str) -> None:
        """Lets no more through to each host, as tc writes it: `100mbit`."""
        for host in self.hosts:
            shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms"]
            self._at_the_switch("tc", "qdisc", "replace", "dev", f"v{host.number}", *shape)

    def _at_the_switch(self, *command: str) -> None:
        switch = psutil.Process(self.top.pid).children()[0]
        inside = ["nsenter", "-t", str(switch.pid), "--net", *command]
        subprocess.run(inside, check=True, env=os.environ | {"PATH": SEARCHED})

    def close(self) -> None:
        self.top.send_signal(signal.SIGKILL)
        self.top.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
