"""Two ranks meet, on two threads: what each can costs a pair its link at most, never the call; and it is told."""

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tricomm.transport.base import Operation
from tricomm.transport.memory import arena, meeting
from tricomm.transport.memory.link import Link
from tricomm.transport.memory.meeting import Candidate, Doorway, doorway, meet
from tricomm.transport.memory.rungs import PairTransports, Rung
from tricomm.transport.memory.transfers import Patience

LIMIT_SECONDS = 20.0


def both_meet() -> tuple[list[dict[int, Link]], list[PairTransports]]:
    """What rank 0 and rank 1 find, links and transports of each."""
    store = dist.HashStore()
    come, told = threading.Barrier(2), threading.Barrier(2)
    texts: dict[int, dict[int, str]] = {}
    links: list[dict[int, Link]] = [{}, {}]
    transports: list[PairTransports] = [{}, {}]
    problems: list[BaseException] = []

    def run(rank: int) -> None:
        def exchange(mine: Any) -> dict[int, str]:
            texts[rank] = dict(mine)
            told.wait(LIMIT_SECONDS)
            theirs = {other: texts[other][rank] for other in mine}
            told.wait(LIMIT_SECONDS)
            return theirs

        try:
            door = doorway(store, rank)
            assert door is not None
            come.wait(LIMIT_SECONDS)
            links[rank], transports[rank] = meet(door, exchange, lambda: None, {})
            door.close()
        except BaseException as error:
            problems.append(error)
            told.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_SECONDS)
    if problems:
        raise problems[0]
    return links, transports


def rungs(found: PairTransports) -> list[Rung]:
    return [found[pair].rung for pair in ((0, 1), (1, 0))]


def require_moves(links: list[dict[int, Link]]) -> None:
    """Few bytes, which go by way of an arena, arrive."""
    here, there = links[0][1], links[1][0]
    room = torch.zeros(5, dtype=torch.uint8)
    here.offer(Operation(True, 1, torch.arange(5, dtype=torch.uint8)), 1)
    there.expect(Operation(False, 0, room), 1).wait(there, Patience(timedelta(seconds=LIMIT_SECONDS), (there,)))
    assert room.tolist() == [0, 1, 2, 3, 4]


def test_both_know_both_ways_and_the_log_tells(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tricomm")
    links, transports = both_meet()
    assert transports[0] == transports[1]
    assert rungs(transports[0]) == [Rung.READ, Rung.READ]
    require_moves(links)
    told = sorted(record.getMessage() for record in caplog.records)
    assert told == [
        "rank 0 receives from ranks [1] by process_vm_readv",
        "rank 1 receives from ranks [0] by process_vm_readv",
    ]


def test_a_python_that_was_built_for_an_old_system_has_links_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "pidfd_open")
    for name in ("F_ADD_SEALS", "F_GET_SEALS", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL"):
        monkeypatch.delattr(fcntl, name)
    links, transports = both_meet()
    assert rungs(transports[0]) == [Rung.READ, Rung.READ]
    require_moves(links)


def no_file(*_: object) -> int:
    raise OSError(errno.EMFILE, "too many open files")


def test_without_files_of_memory_all_takes_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "new_file", no_file)
    links, transports = both_meet()
    assert links == [{}, {}]
    assert transports[0] == transports[1]
    assert rungs(transports[0]) == [Rung.NETWORK, Rung.NETWORK]
    assert "its local socket cannot be reached: [Errno 24] too many open files" in transports[0][0, 1].reason


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_greet_costs_nobody_the_call(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    greet = Candidate.greet

    def failing(candidate: Candidate, here: Any) -> None:
        if here.rank == rank:
            no_file()
        greet(candidate, here)

    monkeypatch.setattr(Candidate, "greet", failing)
    links, transports = both_meet()
    assert links == [{}, {}]
    assert transports[0] == transports[1]
    assert rungs(transports[0]) == [Rung.NETWORK, Rung.NETWORK]


def test_no_rank_reads_where_no_file_can_be_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise OSError(errno.EACCES, "no mapping")

    monkeypatch.setattr(meeting, "mapped_slab", refuse)
    links, transports = both_meet()
    assert links == [{}, {}]
    assert [one.reason for one in transports[0].values()] == ["no file could be handed over"] * 2


HOSTS: dict[str, Callable[[], str]] = {
    "another kernel": lambda: f"kernel {threading.get_ident()}/1",
    "another network namespace": lambda: f"kernel/{threading.get_ident()}",
}


@pytest.mark.parametrize("which", HOSTS)
def test_ranks_of_other_hosts_do_not_find_each_other(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "host_key", HOSTS[which])
    assert both_meet() == ([{}, {}], [{}, {}])


def test_a_system_without_local_sockets_has_no_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doorway, "__init__", no_file)
    assert doorway(dist.HashStore(), 0) is None
