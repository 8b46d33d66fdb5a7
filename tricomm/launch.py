"""Ranks on this machine: processes started once, that then run any number of functions.

The demo, the benchmarks and the tests run on it. A training job has its own launcher and does not need it.
"""

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A function raised, or a rank ended, on one of the processes."""


class Ranks:
    """``size`` processes that form a gloo process group. Use it as a context manager.

    Args:
        size: how many.
        timeout_seconds: of ``run``.
        wrap: how the process of a rank is started; it gets the rank and returns nothing, and is called in the
            new process before anything else (to enter a network namespace, for instance).
        store: where the processes meet; None starts one on this machine's loopback.
        store_address: of the store, as the processes see it.
        start_timeout_seconds: for all processes to start and to meet, which takes long on a busy machine.
        preload: modules that one process imports, from which those of the ranks are then forked; empty starts each
            by itself. Importing torch takes seconds on each rank. The first that names any in this process decides.
    """

    def __init__(
        self,
        size: int,
        timeout_seconds: float = 300.0,
        wrap: Callable[[int], None] | None = None,
        store: dist.TCPStore | None = None,
        store_address: str = "127.0.0.1",
        start_timeout_seconds: float = 180.0,
        preload: Sequence[str] = (),
    ) -> None:
        self.size = size
        self.start_timeout_seconds = start_timeout_seconds
        self.timeout_seconds = timeout_seconds
        self.store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context: Any = multiprocessing.get_context("forkserver" if preload else "spawn")
        if preload:
            context.set_forkserver_preload(list(preload))
        of_group = max(timeout_seconds, start_timeout_seconds)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, size, (store_address, self.store.port), theirs, of_group, wrap),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> "Ranks":
        try:
            self.start(_ready)
            self._collect(range(self.size), self.start_timeout_seconds)
        except BaseException:
            # A block that does not begin does not end either.
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` on every rank; the results in rank order.

        Raises:
            RankError: with the traceback of the first rank that failed.
        """
        self.start(function, *arguments)
        return self.collect(range(self.size))

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call on every rank."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def collect(self, ranks: Sequence[int]) -> list[Any]:
        """The results of the call that was begun, from some ranks."""
        return self._collect(ranks, self.timeout_seconds)

    def _collect(self, ranks: Sequence[int], timeout_seconds: float) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        results: list[Any] = []
        failures: list[str] = []
        for rank in ranks:
            pipe = self._pipes[rank]
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise RankError(f"rank {rank} did not answer within {timeout_seconds} s")
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process has ended"
            if not ok:
                failures.append(f"rank {rank}: {value}")
            results.append(value)
        if failures:
            raise RankError("\n".join(failures))
        return results

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return int(self._processes[rank].pid)


def _ready(rank: int) -> int:
    return rank


def _serve(
    rank: int,
    size: int,
    store_address: tuple[str, int],
    pipe: Connection,
    timeout_seconds: float,
    wrap: Callable[[int], None] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if wrap is not None:
        wrap(rank)
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: a collection that looks through torch takes 0.2 s
    store = dist.TCPStore(*store_address, is_master=False)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, function(rank, *arguments))
        except BaseException:  # torch's CheckpointException is not an Exception
            answer = (False, traceback.format_exc())
        pipe.send(answer)
