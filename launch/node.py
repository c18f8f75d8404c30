"""What ``srun`` starts on each node of a job: ``torchrun``, and what its end means.

    python -m launch.node STATE_DIR [torchrun arguments] -m joint_train [overrides]
    python -m launch.node --first-failure STATE_DIR

How a run is stopped so that its save is not cut off:

1. Slurm sends SIGUSR1 ahead of the time limit to the batch shell alone (``--signal=B:USR1@…``). The shell notes it, so
   that a warning between two attempts isn't lost either, and passes it to ``srun``, which passes it to this process on
   every node. A preemption, ``scancel`` and ``scontrol requeue`` send SIGTERM to this process themselves.
2. ``torchrun``'s agent runs in this process. It hands SIGTERM to its workers by itself, SIGUSR1 because of
   ``--signals-to-handle``; then it waits ``PET_SHUTDOWN_TIMEOUT`` seconds (30 by default: too short for a checkpoint)
   before it kills them, and starts no worker again.
3. The workers save together and exit with 85, or with 86 when the time didn't suffice
   (joint_train/distributed/preemption.py). An agent that never had the signal sees that code.

Either way this process leaves ``STATE_DIR/preempted`` and exits with 0, so that ``srun --kill-on-bad-exit`` does not
end the other nodes while they still save. The job script finds the file and puts the job back in the queue.
``torchrun`` is run with ``--max-restarts=0``: its own restarts would count a preempted worker as a crash and start it
again. The job script restarts a crashed run as a new job step: a fresh rendezvous on nodes that Slurm has cleaned.

A crash exits with 1 and leaves the node's first failure in ``STATE_DIR/failure-<node>.json``.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

REPORT_SECONDS = 5.0


def main(state: Path, arguments: list[str]) -> int:
    """Run one node's agent until its workers end; 0 when they finished or were preempted, 1 after a crash."""
    node = os.environ.get("SLURM_NODEID", "0")

    def preempted(*_: object) -> None:
        (state / "preempted").touch()
        os._exit(0)  # the agent doesn't run yet, so there is nothing to save

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, preempted)

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from joint_train.distributed.preemption import OVERRUN, PREEMPTED

    # The agents tell their host by its name otherwise, which fails where host names have several forms.
    is_host = f"is_host={'true' if node == '0' else 'false'}"
    try:
        run.main([f"--rdzv-conf={is_host},join_timeout=300", *arguments])
    except SignalException:
        (state / "preempted").touch()
    except ChildFailedError as error:
        # The first failure only: after a crash the agent ends the node's other ranks, which then report a preemption.
        rank, failure = error.get_first_failure()
        if failure.exitcode in (PREEMPTED, OVERRUN):
            (state / "preempted").touch()
            return 0
        (state / f"failure-{node}.json").write_text(json.dumps(describe(rank, failure)))
        # srun kills the other nodes as soon as this process fails. The rank that broke is seldom the one whose agent is
        # first: let the others write their report.
        time.sleep(REPORT_SECONDS)
        return 1
    except Exception:
        # The host of the rendezvous was preempted first, and its store went with it.
        if not (state / "preempted").exists():
            raise
    return 0


def describe(rank: int, failure: "ProcessFailure") -> dict:
    """A rank's failure; one that was killed, or that reported its error in one sentence, has no traceback."""
    report = failure.error_file_data["message"] if os.path.isfile(failure.error_file) else None
    return {
        "rank": rank,
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "exit_code": failure.exitcode,
        "message": report["message"] if report else failure.message,
        "traceback": report["extraInfo"].get("py_callstack") if report else None,
        "time": os.path.getmtime(failure.error_file) if report else failure.timestamp,
    }


def first_failure(state: Path) -> str:
    """The failure that began it, of all nodes' first ones, with its traceback.

    A rank that was killed writes no report and is noticed by polling, possibly after other ranks have reported the
    connection they lost: it goes before reports of the same second.
    """
    failures = [json.loads(path.read_text()) for path in state.glob("failure-*.json")]
    if not failures:
        return "no rank reported a failure: see the log above for what srun says of the nodes"
    first = min(failures, key=lambda failure: failure["time"] - (failure["traceback"] is None))
    code = first["exit_code"]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    what = f"first failure: rank {first['rank']} on {first['host']}, {ended}: {first['message']}"
    return f"{what}\n{first['traceback'] or ''}"


if __name__ == "__main__":
    if sys.argv[1] == "--first-failure":
        print(first_failure(Path(sys.argv[2])).rstrip())
    else:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
