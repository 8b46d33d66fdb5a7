"""Run a command once per device of an emulated cluster, as torchrun does on a real one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from bench.cluster.cluster import Cluster
from bench.cluster.network import ClusterError

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
OUTPUT_SECONDS = 5.0


def run_command(cluster: Cluster, command: Sequence[str]) -> int:
    """Run a command once per device inside of its host, with the variables that torchrun sets.

    Returns:
        0, or the exit code of the first that failed; the others are then ended.
    """
    processes: list[subprocess.Popen[bytes]] = []
    forwarders: list[threading.Thread] = []
    try:
        for seat in cluster.seats:
            # A session of its own: Ctrl-C reaches this process alone, which then ends all.
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **cluster.environment(seat)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=seat.enter,  # noqa: PLW1509 - no thread has been started yet
                )
            )
        for seat, process in zip(cluster.seats, processes, strict=True):
            assert process.stdout is not None
            forwarder = threading.Thread(target=_forward, args=(seat.rank, process.stdout), daemon=True)
            forwarder.start()
            forwarders.append(forwarder)
        code = _wait_for_all(processes)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"the command {command[0]!r} cannot be started: {error}") from error
    finally:
        _end(processes)
    for forwarder in forwarders:
        forwarder.join(OUTPUT_SECONDS)
    return code


def _forward(rank: int, lines: IO[bytes]) -> None:
    for line in lines:
        sys.stdout.buffer.write(b"[rank %d] %s\n" % (rank, line.rstrip(b"\r\n")))
        sys.stdout.buffer.flush()


def _wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                print(f"rank {rank} ended with exit code {code}; ending the others", file=sys.stderr)
                # What a signal ended has a negative code here, and 128 more in a shell.
                return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(POLL_SECONDS)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to end, and then make it."""
    deadline = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, number)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()) if number == signal.SIGTERM else None)
