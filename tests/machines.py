"""Simulated machines: namespaces for network, host name, processes and mounts on one bridge.

Their traffic crosses a network that can be cut. They share the file system, except /tmp/ray and /dev/shm.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BRIDGE = "10.77.0.1"
# as on Debian: the machine's own name is a loopback address, which no other machine can use
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
SETTLE = """
set -e
name=$1 address=$2 folder=$3
hostname "$name"
mkdir -p /tmp/ray
mount --bind "$folder/ray" /tmp/ray
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs -o size=400m tmpfs /dev/shm
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "$4"
"""
INSIDE = ("--net", "--uts", "--mount", "--pid")


@dataclass
class Machine:
    """A running machine. `init` keeps its namespaces; when it ends, so do all processes."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    init: int
    network: Network

    def popen(
        self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        with log.open("a") as said:
            return subprocess.Popen(
                [*self._enter(), *command], env=dict(environment), stdout=said, stderr=said, stdin=subprocess.DEVNULL
            )

    def run(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._enter(), *command], env=None if environment is None else dict(environment), cwd=cwd,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def hide(self, folder: Path) -> None:
        """Mount an empty folder at this path."""
        subprocess.run([*self._enter(), "mount", "-t", "tmpfs", "tmpfs", folder], check=True)

    def crash(self) -> None:
        """Simulate a power cut: kill -9 of every process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self.holder.wait()

    def link(self, state: str) -> None:
        """Set its link `down` or `up`: while down, packets are lost silently."""
        self.network.ip("link", "set", f"v-{self.name}", state)

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.init}", *INSIDE, f"--wd={Path.cwd()}", "--"]


@dataclass
class Network:
    """A bridge, and the machines on it."""

    folder: Path
    holder: subprocess.Popen[bytes]
    machines: list[Machine] = field(default_factory=list)

    def ip(self, *arguments: str) -> None:
        command = ["nsenter", f"--target={self.holder.pid}", "--net", "--", "ip", *arguments]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def switch_on(self, name: str, number: int) -> Machine:
        """Start a machine with this name and the address 10.77.0.NUMBER."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "ray").mkdir(parents=True)
        (folder / "hosts").write_text(HOSTS.format(name=name))
        holder = subprocess.Popen(
            ["unshare", *INSIDE, "--fork", "--mount-proc", "--kill-child", "sleep", "infinity"],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        machine = Machine(name, f"10.77.0.{number}", holder, _child(holder), self)
        self.machines.append(machine)
        with contextlib.suppress(
            subprocess.CalledProcessError
        ):  # left by an earlier machine: the kernel removes it late
            self.ip("link", "delete", f"v-{name}")
        self.ip("link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(machine.init))
        self.ip("link", "set", f"v-{name}", "master", "bridge", "up")
        settled = machine.run("sh", "-c", SETTLE, "settle", name, machine.address, str(folder), BRIDGE)
        assert settled.returncode == 0, settled.stderr
        return machine


def _child(holder: subprocess.Popen[bytes]) -> int:
    """Find the first process in the namespaces that `unshare` creates."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert holder.poll() is None, "no namespaces"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text() == "sleep\n":
            return int(children[0])
        time.sleep(0.01)
    raise AssertionError("no namespaces within 10 s")


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Create a bridge; stop all machines at the end. Skips the test if namespaces are unavailable."""
    if any(shutil.which(program) is None for program in ("unshare", "nsenter", "ip", "ss")):
        pytest.skip("no network namespaces: unshare, nsenter, ip or ss is not installed")
    if subprocess.run(["unshare", *INSIDE, "--fork", "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces: not allowed to make them")
    # no --fork: the process itself is in the namespace
    holder = subprocess.Popen(
        ["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL, start_new_session=True
    )
    made = Network(folder, holder)
    while Path(f"/proc/{holder.pid}/comm").read_text() != "sleep\n":
        assert holder.poll() is None, "no network namespace"
        time.sleep(0.01)
    try:
        made.ip("link", "add", "bridge", "type", "bridge")
        made.ip("address", "add", f"{BRIDGE}/24", "dev", "bridge")
        made.ip("link", "set", "bridge", "up")
        yield made
    finally:
        for machine in made.machines:
            machine.crash()
        holder.kill()
        holder.wait()
