"""Run a function on N ranks of a gloo process group: real processes, cheap to start.

A fork server imports torch, transformers and the models once; each rank is forked from it before any thread or process
group exists. Ranks that don't finish in time are killed and the test fails with what they had said.
"""

import io
import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "transformers.models.gemma4.modeling_gemma4", "joint_train.pair.model", "pairs"]
)


def run_ranks(function, world_size: int, *args, timeout: float = 240.0) -> list:
    """``[function(rank, *args) for each rank]``, each on its own process, with the process group up.

    Args:
        function: importable by name; its result must be picklable.
        timeout: seconds for all of it.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or after the time-out.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            arguments = function, rank, world_size, f"{folder}/store", theirs, dict(os.environ), args
            process = CONTEXT.Process(target=_main, args=arguments)
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        results, waiting = [None] * world_size, set(range(world_size))
        try:
            while waiting:
                ready = wait([ends[r] for r in waiting], timeout=timeout)
                assert ready, f"ranks {sorted(waiting)} gave no answer in {timeout} s"
                for rank in [r for r in waiting if ends[r] in ready]:
                    try:
                        failed, results[rank] = ends[rank].recv()
                    except EOFError:
                        failed, results[rank] = True, f"it died (exit code {processes[rank].exitcode})"
                    assert not failed, f"rank {rank}: {results[rank]}"
                    results[rank] = torch.load(io.BytesIO(results[rank]), weights_only=False)
                    waiting.discard(rank)
        finally:
            for process in processes:
                process.join(timeout=5 if not waiting else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
        return results


def _main(function, rank, world_size, store, pipe, environment, args):
    torch.set_num_threads(1)
    os.environ.update(environment)  # the server that forks may be older than what a test has set
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = io.BytesIO()  # a pipe would send a tensor as shared memory, which goes with its process
        torch.save(function(rank, *args), result)
        pipe.send((False, result.getvalue()))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    pipe.close()
