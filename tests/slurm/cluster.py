"""A Slurm cluster of two one-core nodes inside this machine: munged, slurmctld and two ``slurmd -N`` on loopback.

Everything (keys, sockets, ports, state, logs) lives in one temporary folder; :meth:`Cluster.stop` ends every daemon
that :meth:`Cluster.start` started. Needs root, because Slurm starts jobs as the user who submits them.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")

# proctrack/linuxproc and task/none: containers have neither systemd nor a writable cgroup.
# cred_expire is the wait before a requeued job may start again (120 s by default).
# KillWait is the time between SIGTERM and SIGKILL when a job is cancelled, requeued or out of time.
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmctldParameters=enable_configless
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait={kill_wait}
MinJobAge=300
NodeName=node[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]


def free_ports(count: int) -> list[int]:
    """The first of ``count`` consecutive ports that nobody listens on, below the range of ephemeral ports."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, sock in enumerate(sockets):
                sock.bind(("127.0.0.1", first + offset))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for sock in sockets:
                sock.close()
    raise RuntimeError("no free ports between 21000 and 32000")


class Cluster:
    def __init__(self, kill_wait: int = 10):
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.root.chmod(0o755)  # munged refuses a socket in a folder that others can't enter
        self.daemons: list[subprocess.Popen] = []
        self.env = os.environ | {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        self.conf = CONFIG.format(root=self.root, host=socket.gethostname(), ports=free_ports(3), kill_wait=kill_wait)

    def start(self, timeout: float = 60) -> "Cluster":
        """Start the daemons and wait until both nodes are idle.

        Raises RuntimeError with the daemons' last log lines when they aren't within ``timeout`` seconds.
        """
        munge = self.root / "munge"
        for folder in (munge, self.root / "state", self.root / "spool.node0", self.root / "spool.node1"):
            folder.mkdir()
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.root / "slurm.conf").write_text(self.conf)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        deadline = time.monotonic() + timeout
        while not (munge / "socket").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._daemon("slurmctld", "-D", "-c")
        for node in ("node0", "node1"):
            self._daemon("slurmd", "-D", "-N", node)
        while time.monotonic() < deadline:
            states = self.run("sinfo", "-h", "-N", "-o", "%t", check=False).stdout.split()
            if states == ["idle", "idle"]:
                return self
            time.sleep(0.2)
        logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.root.rglob("*log")))
        self.stop()
        raise RuntimeError(f"the two nodes are not idle after {timeout:.0f} s\n{logs}")

    def stop(self) -> None:
        """Cancel what still runs, end every daemon and remove the folder."""
        if len(self.daemons) > 1:
            self.run("scancel", "--signal=KILL", "--full", "-u", "root", check=False)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.env, check=check, timeout=timeout, capture_output=True, text=True)

    def _daemon(self, *command: str) -> None:
        log = open(self.root / f"{command[0]}-{len(self.daemons)}.stdout.log", "w")
        with log:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))
