"""Functions run in several forked processes with a gloo group between them."""

import pickle
import tempfile
import time
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def _work(rank, world, init, function, args, results, timeout):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    try:
        outcome = function(rank, world, *args)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    # pickled here, since torch would share the memory of tensors with a process that is about to end
    results.put((rank, pickle.dumps(outcome)))
    dist.destroy_process_group()


def run_together(function, world, *args, group_timeout=60, limit=60, survivors=None):
    """What ``function(rank, world, *args)`` returns on every rank in order; for an exception, its name and message.

    Args:
        function: what to run.
        world: number of processes.
        args: handed on.
        group_timeout: timeout of the group, in seconds.
        limit: seconds after which the processes are killed.
        survivors: ranks that give a result, all by default.
    """
    survivors = range(world) if survivors is None else survivors
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("fork").SimpleQueue()
        arguments = (world, f"{folder}/init", function, args, results, group_timeout)
        context = mp.start_processes(_work, arguments, nprocs=world, join=False, start_method="fork")
        end, found = time.monotonic() + limit, {}
        try:
            while len(found) < len(survivors):
                assert time.monotonic() < end, f"only {sorted(found)} of {world} processes ended within {limit} s"
                if results.empty():
                    time.sleep(0.02)
                else:
                    rank, outcome = results.get()
                    found[rank] = pickle.loads(outcome)
            for process in context.processes:
                process.join(max(end - time.monotonic(), 0.1))
        finally:
            for process in context.processes:
                process.kill()
        return [found[rank] for rank in survivors]
