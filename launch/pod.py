"""What a pod of Kubernetes or a node of SkyPilot starts: ``torchrun``, with exit codes for a restart policy.

    python -m launch.pod NAME [overrides of python -m joint_train]

The nodes find each other by the environment: JOINT_TRAIN_NODES, JOINT_TRAIN_RANKS (of a node), JOINT_TRAIN_NODE (this
one's number), JOINT_TRAIN_ADDRESS (``host:port`` of the first) and JOINT_TRAIN_ATTEMPT (the same on all of them, and
another one after each restart). With JOINT_TRAIN_PREFLIGHT=1 hosts and network are checked first.

torchrun itself ends with 1 whatever its workers end with. This ends with theirs, see docs/exit-codes.md: 85 where the
run was told to stop and is saved, 2 where it was refused with a sentence, which no restart changes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from joint_train.command import EXPLAINED_ERROR, PREEMPTED

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(name: str, overrides: list[str]) -> int:
    """The exit code of this node's part of the run."""
    environment = os.environ
    nodes, ranks = (int(environment[f"JOINT_TRAIN_{of}"]) for of in ("NODES", "RANKS"))
    attempt = environment.get("JOINT_TRAIN_ATTEMPT") or "0"
    environment["SLURM_NODEID"] = environment["JOINT_TRAIN_NODE"]  # by which launch.node knows the first node
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    modules = ["launch.preflight"] * (environment.get("JOINT_TRAIN_PREFLIGHT") == "1") + ["joint_train"]
    for module in modules:
        torchrun = [
            f"--nnodes={nodes}", f"--nproc-per-node={ranks}", "--max-restarts=0", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={environment['JOINT_TRAIN_ADDRESS']}", f"--rdzv-id={name}-{attempt}-{module}",
            f"--signals-to-handle={SIGNALS}", "-m", module, *overrides,
        ]  # fmt: skip
        if code := run(torchrun):
            return code
    return 0


def run(torchrun: list[str]) -> int:
    """Run ``launch.node`` with these arguments, pass it the signals that come here, and return what its end means."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        child = subprocess.Popen([sys.executable, "-m", "launch.node", str(state), *torchrun])
        # The first process of a container has no default handlers: without these a pod's SIGTERM would be lost.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: child.send_signal(number))
        code = child.wait()
        if (state / "preempted").exists():
            return PREEMPTED
        codes = [json.loads(file.read_text())["exit_code"] for file in state.glob("failure-*.json")]
        return EXPLAINED_ERROR if EXPLAINED_ERROR in codes else code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["--help"], ["-h"]):
        print(__doc__.strip())
        sys.exit(0)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
