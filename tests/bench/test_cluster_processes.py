"""A small emulated cluster, where the machine allows one: what runs in it, and what it leaves behind."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bench.cluster import network
from bench.cluster.cluster import Cluster
from tricomm import Topology
from tricomm.launch import Ranks

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]


@cache
def why_not() -> str | None:
    return network.why_not()


@pytest.fixture
def machine() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Cluster, Ranks]]:
    if why_not() is not None:
        pytest.skip(str(why_not()))
    with Cluster.uniform(2, 2, 100e6, nics_per_host=2) as cluster, cluster.ranks(60) as ranks:
        yield cluster, ranks
    assert network.namespaces(cluster.name) == []


def where(rank: int) -> tuple[str, tuple[str, ...]]:
    return socket.gethostname(), Topology.detect().hosts


def test_ranks_know_their_hosts(running: tuple[Cluster, Ranks]) -> None:
    cluster, ranks = running
    assert ranks.run(where) == [(name, cluster.host_names) for name in cluster.host_names]
    assert socket.gethostname() not in cluster.host_names


def run_cli(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bench.cluster", "run", "--hosts", "2", "--", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def owned_by(pid: int) -> list[str]:
    return network.namespaces(f"tricomm-{pid}")


@pytest.mark.usefixtures("machine")
def test_a_command_runs_on_every_device() -> None:
    process = run_cli("sh", "-c", "echo $RANK of $WORLD_SIZE on $(hostname) at $MASTER_ADDR")
    out, _ = process.communicate(timeout=30)
    assert sorted(out.splitlines()) == [
        "[rank 0] 0 of 2 on host0 at 10.78.0.1",
        "[rank 1] 1 of 2 on host1 at 10.78.0.1",
    ]
    assert process.returncode == 0
    assert owned_by(process.pid) == []


@pytest.mark.usefixtures("machine")
def test_one_that_fails_ends_the_others() -> None:
    process = run_cli("sh", "-c", "test $RANK = 0 && exit 3; sleep 1000")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "rank 0 ended with exit code 3; ending the others" in err


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(number: int) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests were started with the signal ignored, as a shell does in the background")
    process = run_cli("sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert owned_by(process.pid) == []


@pytest.mark.usefixtures("machine")
def test_what_a_crash_leaves_is_removed() -> None:
    process = run_cli("sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait(30)
    left = owned_by(process.pid)
    assert len(left) == 3
    abandoned = network.processes_in(left)
    assert abandoned
    assert set(left) <= set(network.clean())
    process.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in abandoned) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert owned_by(process.pid) == []
