"""Two hosts on one machine: network namespaces with a link between them, and mpiexec with a rank in each.

    with Link(rate=1000) as link:
        subprocess.run(link.mpiexec(sys.executable, "program.py"), env={**os.environ, **link.environment})

Needs Linux, root, the commands ip and tc, and the mpiexec of mpich; available() says what is missing. Nothing is
added to the machine's own network, and nothing is left after the block.
Shared by scripts/bench/processes.py and tests/test_network.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEVICE = "link0"
ADDRESSES = ("10.213.77.1", "10.213.77.2")      # they exist within the namespaces alone
LAUNCHER = """#!/bin/sh
# Called by mpiexec, like ssh: [options] HOST COMMAND. The host is the second one: mpiexec runs on the first.
while [ "$1" != {host} ]; do shift; done
shift
exec ip netns exec {namespace} sh -c "$*"
"""
_numbers = itertools.count()


class NoNetwork(RuntimeError):
    """A command that sets up the network has failed."""


def mpiexec() -> str | None:
    """The mpiexec beside this Python, or the one in PATH."""
    return next((str(path) for path in (Path(sys.executable).with_name("mpiexec"), shutil.which("mpiexec"))
                 if path and Path(path).exists()), None)


@functools.cache
def available() -> str:
    """Why there can be no Link here; "" if there can be one."""
    if missing := [command for command in ("ip", "tc") if not shutil.which(command)]:
        return f"there is no command {' and no '.join(missing)} (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not mpiexec() or "HYDRA" not in _run(mpiexec(), "--version"):
        return "needs the mpiexec of mpich: pip install -e '.[mpi]'"
    try:
        with Link(rate=1000):
            return ""
    except NoNetwork as error:
        return str(error)


class Link:
    """Two network namespaces, host 0 and host 1, joined by a link of `rate` Mbit/s each way. It adds no delay.

    environment: variables with which MPI uses the link, although both ranks are on one machine. Raises NoNetwork.
    """

    environment = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": DEVICE, "FI_PROVIDER": "tcp"}

    def __init__(self, rate: int):
        self.rate = rate
        name = f"minilm-{os.getpid()}-{next(_numbers)}"
        self.namespaces = (f"{name}-0", f"{name}-1")

    def __enter__(self) -> Link:
        with contextlib.ExitStack() as stack:
            self._launcher = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "launcher"
            self._launcher.write_text(LAUNCHER.format(host=ADDRESSES[1], namespace=self.namespaces[1]))
            self._launcher.chmod(0o700)
            for namespace in self.namespaces:
                stack.callback(_remove, namespace)
                _run("ip", "netns", "add", namespace)
            first, second = self.namespaces
            burst = max(64, self.rate // 8)             # of 1 ms: on a busy machine timers are late
            _run(*f"ip link add {DEVICE} netns {first} type veth peer name {DEVICE} netns {second}".split())
            for namespace, address in zip(self.namespaces, ADDRESSES):
                _run(*f"ip -n {namespace} address add {address}/24 dev {DEVICE}".split())
                _run(*f"ip -n {namespace} link set {DEVICE} up".split())
                _run(*f"ip -n {namespace} link set lo up".split())
                _run(*f"tc -n {namespace} qdisc add dev {DEVICE} root tbf rate {self.rate}mbit burst {burst}kb "
                      "latency 50ms".split())
            self._wait_until_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stack.close()

    def mpiexec(self, *program: str) -> list[str]:
        """The words that run a program as rank 0 on host 0, where mpiexec is too, and as rank 1 on host 1."""
        return ["ip", "netns", "exec", self.namespaces[0], str(mpiexec()), "-hosts", ",".join(ADDRESSES), "-n", "2",
                "-ppn", "1", "-launcher", "ssh", "-launcher-exec", str(self._launcher), *program]

    def sent(self, host: int) -> int:
        """The bytes that a host has sent over the link, with the headers of TCP, IP and Ethernet."""
        return int(self._read(host, "statistics/tx_bytes"))

    def down(self) -> None:
        """From now on nothing that is sent arrives, and nobody is told."""
        _run("ip", "-n", self.namespaces[0], "link", "set", DEVICE, "down")

    def _wait_until_up(self, patience=10.0):
        """MPI leaves out a device that is not up when it starts."""
        deadline = time.monotonic() + patience
        while {self._read(host, "operstate") for host in (0, 1)} != {"up\n"}:
            if time.monotonic() > deadline:
                raise NoNetwork(f"{DEVICE} is not up after {patience:.0f} s")
            time.sleep(0.01)

    def _read(self, host, what):
        return _run("ip", "netns", "exec", self.namespaces[host], "cat", f"/sys/class/net/{DEVICE}/{what}")


def _remove(namespace):
    """Ends the processes that are still in a namespace, and removes it with its end of the link."""
    with contextlib.suppress(NoNetwork):                # it was never added
        for process in _run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        _run("ip", "netns", "delete", namespace)


def _run(*words):
    """What a command prints. Raises NoNetwork with its error."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise NoNetwork(f"{shlex.join(words)}: {' '.join(done.stderr.split())}")
    return done.stdout
