"""A real Slurm of several nodes on this machine: slurmctld, munged, and a slurmd per node in namespaces of its own.

A node has its own PID, UTS, IPC and mount namespace: ``hostname`` is the node's, /dev/shm and /etc/hosts are its own,
and killing its first process kills all of it at once, as a power cut would. With ``network=True`` also an address,
ports and a loopback interface of its own; otherwise the nodes are 127.0.1.1, 127.0.1.2, ... of one network. CPUs,
memory and GPUs are declared, not real. Needs root, and Debian's packages that ``launch/install.sh --dev`` installs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from agpo_megatron.cluster.keeper import die_with_parent

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "nsenter", "ip")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
START_SECONDS = 60.0

NODE = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 shm /dev/shm
slurmd -D -N "$1" &
set +e
while kill -0 $! 2>/dev/null; do wait $!; done  # bash also reaps orphans of jobs
"""

CONFIG = """
ClusterName=tests
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,bf_continue,sched_min_interval=100000,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MinJobAge=3600
GresTypes=gpu
"""
# cred_expire: a requeued job starts only once its old credential has expired, 120 s by default.
# bf_interval: heterogeneous jobs are started by the backfill scheduler alone.


def missing() -> str:
    """Why there can be no cluster here; "" when there can."""
    lacking = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    if lacking:
        return f"{', '.join(lacking)} not installed (bash launch/install.sh --dev, as root)"
    probe = ["unshare", "--uts", "--ipc", "--pid", "--mount", "--net", "--fork", "true"]
    if os.geteuid() or subprocess.run(probe, capture_output=True).returncode:
        return "namespaces need root and the right to make them"
    return ""


class SlurmCluster:
    """``nodes`` nodes n1, n2, ..., each with ``gpus`` declared GPUs; up on entry, gone without a trace on exit."""

    def __init__(self, nodes: int, gpus: int = 8, network: bool = False) -> None:
        self.names = [f"n{i}" for i in range(1, nodes + 1)]
        self._gpus, self._network = gpus, network
        # Not pytest's folder: sockets need a short path, and Slurm none with brackets.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {
            "PATH": f"{os.environ.get('PATH', '')}:{PATH}",
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": f"{self.folder}/slurm.conf",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._tag = f"agpo{os.getpid() % 100000}"
        self.subnet = f"10.213.{os.getpid() % 256}"

    # Up and down

    def __enter__(self) -> Self:
        try:
            self._configure()
            if self._network:
                self._make_bridge()
            self._spawn("munged", *self._munged())
            wait_for((self.folder / "munge" / "socket").exists, "munged to listen")
            self._spawn("slurmctld", "slurmctld", "-D", "-c")
            for name in self.names:
                self._start_node(name)
            wait_for(lambda: self._up(self.names), "all nodes to be idle", START_SECONDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in [*self.names, "slurmctld", "munged"]:
            self._kill(name)
        if self._network:
            for name in self.names:
                run("ip", "netns", "del", self._tag + name)
            run("ip", "link", "del", self._tag)
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def crash(self, name: str) -> None:
        """Cut the power of a node, and tell Slurm at once (it would find out by itself in SlurmdTimeout)."""
        self._kill(name)
        self.control("update", f"NodeName={name}", "State=DOWN", "Reason=crashed")
        # Slurm may still count an earlier sign of life as the node's return.
        time.sleep(2)
        self.control("update", f"NodeName={name}", "State=DOWN", "Reason=crashed")

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()  # of a node: unshare, whose child and with it the whole PID namespace goes too
            daemon.wait()

    def _spawn(self, role: str, *command: str) -> None:
        with (self.folder / "log" / f"{role}.out").open("ab") as output:
            self._daemons[role] = subprocess.Popen(
                command,
                env=self.env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )

    def _munged(self) -> list[str]:
        folder = self.folder / "munge"
        key = self.folder / "key" / "munge.key"
        return [
            "munged",
            "--foreground",
            f"--socket={folder}/socket",
            f"--key-file={key}",
            f"--pid-file={folder}/pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={key.parent}/seed",
        ]

    def _start_node(self, name: str) -> None:
        command = ["unshare", "--uts", "--ipc", "--pid", "--mount", "--propagation", "private"]
        command += ["--fork", "--kill-child", "--mount-proc"]
        command += ["bash", "-c", NODE, "node", name, str(self.folder)]
        if self._network:
            command = ["nsenter", f"--net=/run/netns/{self._tag + name}", *command]
        self._spawn(name, *command)

    def _up(self, names: list[str]) -> bool:
        lines = self.command("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        states = dict(line.split() for line in lines)
        return all(states.get(name) == "idle" for name in names)

    # Configuration

    def _configure(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("log", "state", "spool", "dev", "munge"):
            (folder / name).mkdir(mode=0o755)
        (folder / "key").mkdir(mode=0o700)
        key = folder / "key" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for i in range(self._gpus):  # what Slurm takes for a device file
            (folder / "dev" / f"gpu{i}").symlink_to("/dev/null")
        last = self._gpus - 1
        (folder / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu File={folder}/dev/gpu[0-{last}]\n"
        )
        (folder / "cgroup.conf").write_text(
            "CgroupPlugin=disabled\n" if slurm_version() >= (23, 2) else ""
        )
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        host = socket.gethostname().split(".")[0]
        network = self.subnet if self._network else "127.0.1"
        controller = f"{network}.254" if self._network else "127.0.0.1"
        hosts = "127.0.0.1 localhost\n" + (
            f"{controller} {host}\n" if self._network else f"127.0.0.1 {host}\n"
        )
        port = free_ports(len(self.names) + 1)
        config = CONFIG.format(host=host, controller=controller, port=port, folder=folder)
        for i, name in enumerate(self.names, 1):
            hosts += f"{network}.{i} {name}\n"
            config += (
                f"NodeName={name} NodeHostname={name} NodeAddr={network}.{i} Port={port + i} CPUs=64 "
                f"RealMemory=512000 Gres=gpu:{self._gpus} State=UNKNOWN\n"
            )
        config += (
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP\n"
        )
        (folder / "hosts").write_text(hosts)
        (folder / "slurm.conf").write_text(config)

    def _make_bridge(self) -> None:
        bridge = self._tag
        run("ip", "link", "add", bridge, "type", "bridge", check=True)
        run("ip", "addr", "add", f"{self.subnet}.254/24", "dev", bridge, check=True)
        run("ip", "link", "set", bridge, "up", check=True)
        for i, name in enumerate(self.names, 1):
            space, outer = self._tag + name, self._tag + name
            run("ip", "netns", "add", space, check=True)
            run(
                "ip",
                "link",
                "add",
                outer,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
                check=True,
            )
            run("ip", "link", "set", outer, "master", bridge, "up", check=True)
            inside = ("ip", "-n", space)
            run(*inside, "addr", "add", f"{self.subnet}.{i}/24", "dev", "eth0", check=True)
            run(*inside, "link", "set", "lo", "up", check=True)
            run(*inside, "link", "set", "eth0", "up", check=True)

    # Use

    def command(
        self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        result = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def control(self, *arguments: str) -> str:
        return self.command("scontrol", *arguments)

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.control("show", "job", "-o", job))
        assert found
        return found[1]

    def processes(self) -> Iterator[psutil.Process]:
        """What jobs run on the nodes: every process with a job's environment of this cluster."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                ours = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_JOB_ID" in env
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def roles(self, module: str, **env: str) -> list[psutil.Process]:
        """Processes of jobs that run ``module``, with these environment variables."""
        return [
            p
            for p in self.processes()
            if module in p.cmdline() and all(p.environ().get(k) == v for k, v in env.items())
        ]


def wait_for(condition, what: str, seconds: float = 30.0, pause: float = 0.1) -> None:
    """Poll ``condition`` until it is true; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(pause)


def run(*command: str, check: bool = False) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert not check or result.returncode == 0, f"{command}: {result.stderr}"


def slurm_version() -> tuple[int, ...]:
    text = subprocess.run(
        ["slurmctld", "-V"], env={"PATH": PATH}, capture_output=True, text=True
    ).stdout
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def free_ports(count: int) -> int:
    """First of ``count`` ports in a row that nobody listens on."""
    for first in range(17000, 30000, 100):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return first
    raise OSError(f"no {count} free ports")
