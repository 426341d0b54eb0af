"""A pool of gloo ranks for many cases: importing Megatron takes seconds, a new process group milliseconds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

AFTERMATH = 20.0
"""Seconds in which the other ranks must notice that one has failed."""


class RankFailed(RuntimeError):
    """A rank raised, or did not answer in time."""


class Ranks:
    """A pool of ``size`` processes. ``run`` lets some of them join over gloo and execute the same function."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        self.calls = 0
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 600.0
    ) -> list[Any]:
        """Run ``function(rank, *args)`` on the first ``world`` ranks; return the results in rank order.

        Raises RankFailed with the traceback of the first rank that failed, or after ``timeout`` seconds. Ranks that
        do not answer at all end the pool; where all report their failure, as with a refused config, it stays usable.
        """
        joined = self._pipes[:world]
        self.calls += 1
        for pipe in joined:
            pipe.send((self.calls, world, function, args))
        results: list[Any] = []
        failure = ""
        for rank, pipe in enumerate(joined):
            if not pipe.poll(AFTERMATH if failure else timeout):
                self.close()
                raise RankFailed(
                    failure or f"rank {rank} did not answer {function.__name__} within {timeout} s"
                )
            ok, value = pickle.loads(pipe.recv_bytes())
            if not ok:
                failure = failure or f"rank {rank}:\n{value}"
            results.append(value)
        if failure:
            raise RankFailed(failure)
        return results

    @property
    def alive(self) -> bool:
        return all(p.is_alive() for p in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    while True:
        try:
            call, world, function, args = pipe.recv()
        except EOFError:
            return
        # Every call makes new process groups and destroys them: a layout has dozens, each with threads of its own.
        rendezvous = dist.PrefixStore(f"call-{call}", store)
        dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=world)
        try:
            answer = (True, function(rank, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        try:
            # As bytes: sent as an object, each tensor would travel as a file descriptor with a handshake of its own.
            pipe.send_bytes(pickle.dumps(answer))
        finally:
            dist.destroy_process_group()
            gc.collect()
