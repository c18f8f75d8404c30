"""Health check of a job's hosts, before its first step: finds the host that would fail or hang the run.

    torchrun … -m launch.preflight [the training's overrides]

Every rank reports to the launcher's key-value store, over TCP and apart from any collective; rank 0 compares and gives
the verdict, and every wait has an end. Checked are, in this order: every rank answers; its device is there and computes
right; it may open enough files; versions are equal; clocks agree; the output folder is one shared folder, writable,
with room for a checkpoint; all-reduce agrees, first within each node and then over all ranks; on GPUs no host gathers
and reduces much slower than the others. The exit code is 0 or 1, and 2 for a
configuration that is refused.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__" and {"--help", "-h"} & set(sys.argv):  # torch takes seconds to import
    sys.exit(print(__doc__))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from joint_train import config  # noqa: E402
from joint_train.command import start  # noqa: E402
from joint_train.errors import ConfigError  # noqa: E402

ANSWER_SECONDS = 120.0
COLLECTIVE_SECONDS = 120.0
SHARED_FOLDER_SECONDS = 30.0  # a network file system may show a new file late
MAX_SKEW_SECONDS = 5.0
SLOW = 0.7  # of the hosts' median bandwidth: below it a host is at fault
BANDWIDTH_BYTES = 256 << 20
MEASURED = torch.cuda.is_available()  # on CPU ranks share the cores, and bandwidth says nothing
FILES_OF_A_PEER = 4  # sockets: of the default group, the control group, a background save's group, NCCL's bootstrap
PACKAGES = ("torch", "transformers", "torchdata", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions that have to be equal on all ranks."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "source": source_hash()}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def source_hash() -> str:
    """A hash of joint_train's own files: hosts with local copies may have different ones."""
    digest = hashlib.sha256()
    for file in sorted(Path(config.__file__).parent.parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def clock() -> float:
    """Seconds since the epoch."""
    return time.time()


def check_device(local_rank: int, local_world_size: int) -> str | None:
    """What is wrong with this rank's device, if anything: it is missing, or a product of small integers is inexact."""
    if int(os.environ.get("GPUS_PER_NODE", 0)) and not torch.cuda.is_available():
        return f"no GPU is visible to torch {torch.__version__}: nvidia-smi there says whether the driver sees one"
    if torch.cuda.is_available() and torch.cuda.device_count() <= local_rank:
        return f"{torch.cuda.device_count()} GPUs are visible to {local_world_size} ranks"
    device = device_of(local_rank)
    a = torch.arange(256, device=device, dtype=torch.float32).remainder(7).repeat(256, 1)
    product = (a @ a.T).cpu()
    expected = float((torch.arange(256).remainder(7) ** 2).sum())
    wrong = int((product != expected).sum())
    return f"a matrix product on {device} is wrong in {wrong} of {product.numel()} places" if wrong else None


def device_of(local_rank: int) -> torch.device:
    """The rank's device, which becomes the current one of the calling thread: in a new thread CUDA's is the first."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def all_reduce(group: dist.ProcessGroup | None, value: float, device: torch.device) -> float:
    """The sum of ``value`` over the group; nan if the elements of the reduced tensor (16 MiB) disagree."""
    tensor = torch.full((1 << 22,), value, device=device)
    dist.all_reduce(tensor, group=group)
    low, high = float(tensor.min()), float(tensor.max())
    return low if low == high else float("nan")


def bandwidth(group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
    """GB/s of a rank, (n-1)/n of the buffer over the time, in all-gather and reduce-scatter over the group."""
    ranks = dist.get_world_size(group)
    whole = torch.zeros(BANDWIDTH_BYTES // 2 // ranks * ranks, dtype=torch.bfloat16, device=device)
    part = torch.zeros(len(whole) // ranks, dtype=torch.bfloat16, device=device)
    found = {}
    for name, run in (
        ("all-gather", lambda: dist.all_gather_into_tensor(whole, part, group=group)),
        ("reduce-scatter", lambda: dist.reduce_scatter_tensor(part, whole, group=group)),
    ):
        run()  # the first one connects
        dist.barrier(group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started, times = time.perf_counter(), 5
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = (time.perf_counter() - started) / times
        found[name] = (ranks - 1) / ranks * whole.nbytes / taken / 1e9
    return found


def check_files(ranks: int) -> str | None:
    """Whether this process may open the sockets of so many ranks. The run raises its own limit as far as it may."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = FILES_OF_A_PEER * ranks + 512
    if most == resource.RLIM_INFINITY or most >= needed:
        return None
    return f"{most} files may be open at most (ulimit -Hn), {ranks} ranks need about {needed}: raise it on this host"


def checkpoint_bytes(cfg: config.Config) -> int | None:
    """Bytes of one checkpoint at most: weights and AdamW's two moments of every parameter, in ``precision.params``.

    None when the pair is a hub id rather than a folder, or its base is the one that an adapter names, so that its size
    isn't known here.
    """
    folders = [Path(cfg.model.base), Path(cfg.model.drafter)]
    if not cfg.model.base or not all(folder.is_dir() for folder in folders):
        return None
    stored = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    return stored // 2 * 3 * (4 if cfg.precision.params == "float32" else 2)  # model.dtype is bfloat16: 2 bytes each


def write_probe(folder: Path, name: str) -> str | None:
    """What is wrong with writing to the folder, if anything."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"can't write to output_dir: {error}"
    return None


def wait_for_file(file: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(file.parent) if file.parent.is_dir() else None  # makes NFS look again
        time.sleep(0.1)
    return True


class Preflight:
    """One health check; ``key`` keeps two checks in the same store apart.

    Args:
        store: reachable from all ranks.
        output_dir: the run's folder.
        needed_bytes: free space that is asked for.
    """

    def __init__(self, store: dist.Store, output_dir: Path, needed_bytes: int | None, key: str = "preflight"):
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self.host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self.store = dist.PrefixStore(key, store)
        self.output_dir, self.needed_bytes = output_dir, needed_bytes
        self.answer_seconds, self.collective_seconds = ANSWER_SECONDS, COLLECTIVE_SECONDS
        self.speeds = ""  # of all ranks together, where they are measured

    def run(self) -> list[str]:
        """The problems, the same list on every rank; empty when all is well."""
        probe = f".preflight-{self.rank}"
        self._put("device", check_device(self.local_rank, self.local_world_size))
        self._put("host", self.host)
        self._put("files", check_files(self.world_size))
        self._put("versions", versions())
        self.earliest = clock()  # before rank 0 has all answers, and says what time it is
        self._put("disk", write_probe(self.output_dir, probe) if self.local_rank == 0 else None)
        # A collective can hang in native code: it runs in a thread that may be left behind.
        threading.Thread(target=self._compare, daemon=True).start()
        try:
            if self.rank == 0:
                problems = self._verdict()
                self.store.set("verdict", json.dumps(problems))
                return problems
            most = 6 * self.answer_seconds + SHARED_FOLDER_SECONDS + 2 * self.collective_seconds
            if not self._wait("verdict", most):
                return [f"{self._who(0)}: gave no verdict within {most:.0f} s"]
            return json.loads(self.store.get("verdict"))
        finally:
            (self.output_dir / probe).unlink(missing_ok=True)

    def _verdict(self) -> list[str]:
        """Rank 0's part: compare all answers, and stop at the first kind of problem, which explains the later ones."""
        for topic in ("device", "host", "files", "versions", "disk"):
            answers, problems = self._gather(topic, self.answer_seconds)
            if topic in ("device", "files", "disk"):
                problems += [f"{self._who(rank)}: {text}" for rank, text in answers.items() if text]
            if topic == "versions":
                problems += self._different(answers)
            if problems:
                return problems
        self.store.set("clock", repr(clock()))
        answers, problems = self._gather("clock", self.answer_seconds)
        for rank, (least, most) in answers.items():
            if (skew := max(least, min(most, 0.0))) and abs(skew) > MAX_SKEW_SECONDS:
                problems.append(f"{self._who(rank)}: its clock is {skew:+.1f} s from that of {self.host}")
        answers, late = self._gather("folder", self.answer_seconds + SHARED_FOLDER_SECONDS)
        problems += late + [f"{self._who(rank)}: {text}" for rank, text in answers.items() if text]
        if problems:
            return problems
        self.store.set("collectives", "start")
        for topic in ("node", "all"):
            answers, problems = self._gather(topic, self.collective_seconds)
            problems += [f"{self._who(rank)}: {text}" for rank, text in answers.items() if text]
            if problems:
                return problems
        if not MEASURED:
            return []
        answers, problems = self._gather("bandwidth", self.collective_seconds)
        return problems or self._slow(answers)

    def _slow(self, answers: dict[int, dict[str, dict[str, float]]]) -> list[str]:
        """Hosts that gather or reduce much slower inside than most do; what all of them reach is only reported."""
        problems, together = [], answers[0].get("all", {})
        self.speeds = ", ".join(f"{name} {speed:.0f} GB/s" for name, speed in together.items())
        for name in ("all-gather", "reduce-scatter"):
            hosts: dict[str, list[float]] = {}
            for rank, found in answers.items():
                if name in found.get("node", {}):
                    hosts.setdefault(json.loads(self.store.get(f"host/{rank}")), []).append(found["node"][name])
            if len(hosts) < 2:
                continue
            slowest = {host: min(speeds) for host, speeds in hosts.items()}
            usual = statistics.median_high(slowest.values())
            problems += [
                f"{host}: {name} inside it reaches {speed:.0f} GB/s a GPU, {usual:.0f} on most hosts"
                for host, speed in slowest.items()
                if speed < SLOW * usual
            ]
        return problems

    def _compare(self) -> None:
        """The checks that need the other ranks: clock, shared folder, collectives."""
        # Rank 0 said its time after the last look that didn't find it, and before the one that did: a rank that is slow
        # knows less of its clock, and isn't blamed for that.
        if (since := self._set_since("clock", 4 * self.answer_seconds)) is None:
            return
        time_of_first = float(self.store.get("clock"))
        self._put("clock", [max(since, self.earliest) - time_of_first, clock() - time_of_first])
        self._put("folder", self._check_folder() if self.local_rank == 0 else None)
        if not self._wait("collectives", 2 * self.answer_seconds + SHARED_FOLDER_SECONDS):
            return
        topic = "node"
        try:
            device = device_of(self.local_rank)
            if dist.is_initialized():  # left by a check that failed: this one is asked again
                dist.destroy_process_group()
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("collectives", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.collective_seconds),
                device_id=device if device.type == "cuda" else None,
            )
            node, _ = dist.new_subgroups(self.local_world_size)
            first = self.rank - self.local_rank
            for topic, group, ranks in (
                ("node", node, range(first, first + self.local_world_size)),
                ("all", None, range(self.world_size)),
            ):
                total, expected = (
                    all_reduce(group, float(self.rank + 1), device),
                    float(sum(rank + 1 for rank in ranks)),
                )
                wrong = f"all-reduce over {len(ranks)} ranks gave {total:g} instead of {expected:g}"
                self._put(topic, None if total == expected else wrong)
            if MEASURED:
                topic, groups = "bandwidth", {"node": node, "all": None}
                self._put(topic, {name: bandwidth(group, device) for name, group in groups.items()})
            dist.destroy_process_group()
        except Exception as error:
            self._put(topic, f"{type(error).__name__}: {error}")

    def _check_folder(self) -> str | None:
        if not wait_for_file(self.output_dir / ".preflight-0", SHARED_FOLDER_SECONDS):
            return f"doesn't see a file that rank 0 wrote to {self.output_dir}: output_dir must be a shared folder"
        free = shutil.disk_usage(self.output_dir).free
        if self.needed_bytes is not None and free < self.needed_bytes:
            return (
                f"{free / 1e9:.1f} GB are free in {self.output_dir}, a checkpoint needs {self.needed_bytes / 1e9:.1f}"
            )
        return None

    def _different(self, answers: dict[int, dict[str, str]]) -> list[str]:
        """Ranks whose versions aren't those of most ranks."""
        problems = []
        for name in sorted({name for found in answers.values() for name in found}):
            most, _ = Counter(found.get(name) for found in answers.values()).most_common(1)[0]
            problems += [
                f"{self._who(rank)}: {name} is {found.get(name)}, on most ranks {most}"
                for rank, found in answers.items()
                if found.get(name) != most
            ]
        return problems

    def _gather(self, topic: str, seconds: float) -> tuple[dict, list[str]]:
        """Every rank's answer, and a problem for each rank that gave none within ``seconds``."""
        deadline = time.monotonic() + seconds
        answers, problems = {}, []
        for rank in range(self.world_size):
            if self._wait(f"{topic}/{rank}", max(0.0, deadline - time.monotonic())):
                answers[rank] = json.loads(self.store.get(f"{topic}/{rank}"))
            else:
                problems.append(f"{self._who(rank)}: no answer on '{topic}' within {seconds:.0f} s")
        return answers, problems

    def _put(self, topic: str, value: object) -> None:
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))

    def _wait(self, key: str, seconds: float) -> bool:
        return self._set_since(key, seconds) is not None

    def _set_since(self, key: str, seconds: float) -> float | None:
        """Wait for a key; by this rank's clock a time at which it may not have been there yet, None if it never came.

        That is the last look that didn't find it, or 0 if the first one did.
        """
        # Polling, because a blocking wait would keep the store from the other thread.
        deadline, before = time.monotonic() + seconds, 0.0
        while True:
            looked = clock()
            if self.store.check([key]):
                return before
            if time.monotonic() > deadline:
                return None
            before = looked
            time.sleep(0.05)

    def _who(self, rank: int) -> str:
        """The rank and its host, as it reported it, or else with Slurm's list of nodes."""
        if self.store.check([f"host/{rank}"]):
            return f"rank {rank} on {json.loads(self.store.get(f'host/{rank}'))}"
        return (
            f"rank {rank} on node {rank // self.local_world_size} of {os.environ.get('SLURM_JOB_NODELIST', 'the job')}"
        )


def main(overrides: list[str]) -> int:
    cfg = config.load(overrides)
    needed = checkpoint_bytes(cfg)
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(f"{', '.join(missing)} are not set: torchrun starts this, once on each node")
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=ANSWER_SECONDS)))
    start = time.monotonic()
    preflight = Preflight(store, Path(cfg.output_dir), needed)
    problems = preflight.run()
    if rank == 0:
        for problem in problems:
            print(f"preflight: {problem}", file=sys.stderr)
        room = "room for a checkpoint not checked" if needed is None else f"room for {needed / 1e9:.1f} GB"
        room += f", {preflight.speeds}" if preflight.speeds else ""
        seconds = time.monotonic() - start
        ranks = f"{world_size} rank{'s' * (world_size != 1)}"
        print(f"preflight {f'failed on {ranks}' if problems else f'passed on {ranks}: {room}'} ({seconds:.1f} s)")
    return 1 if problems else 0


if __name__ == "__main__":
    code = start("launch.preflight", lambda: main(sys.argv[1:]), int(os.environ.get("RANK", 0)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a collective that hangs would keep the interpreter from ending
