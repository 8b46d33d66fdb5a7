"""Two ends of a link in this process: matching, backlogs, slabs, and what comes with the wrong size."""

import os
import socket
from datetime import timedelta

import pytest
import torch

from tricomm.packing.runs import runs_in
from tricomm.transport.base import ConnectionLostError, Operation
from tricomm.transport.memory.arena import Arena
from tricomm.transport.memory.link import EAGER_NBYTES, EAGER_OFFERS, Link
from tricomm.transport.memory.reading import UnreadableError
from tricomm.transport.memory.rungs import Rung
from tricomm.transport.memory.signals import LinkClosedError
from tricomm.transport.memory.transfers import Patience

TAG, OTHER = 3, 4
FEW, MANY = 100, EAGER_NBYTES + 100


@pytest.fixture(params=[Rung.READ, Rung.ARENA], ids=lambda rung: rung.value)
def ends(request: pytest.FixtureRequest) -> tuple[Link, Link]:
    """The two ends of a link."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here, there = (
        Link(peer, end, os.getpid(), request.param, request.param) for peer, end in ((1, first), (0, second))
    )
    return here, there


def patience(*links: Link, seconds: float = 5.0) -> Patience:
    return Patience(timedelta(seconds=seconds), links)


def data(value: int, nbytes: int = 100) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


def room(nbytes: int = 100) -> Operation:
    return Operation(False, 0, torch.zeros(nbytes, dtype=torch.uint8))


@pytest.mark.parametrize("nbytes", [FEW, MANY])
def test_receives_match_as_they_are_posted_however_they_are_waited_for(ends: tuple[Link, Link], nbytes: int) -> None:
    here, there = ends
    expected = [(operation := room(nbytes), there.expect(operation, TAG)) for _ in range(2)]
    values = ((1, TAG), (7, OTHER), (2, TAG))
    offers = [here.offer(Operation(True, 1, data(value, nbytes)), tag) for value, tag in values]
    late = room(nbytes)
    work = there.expect(late, TAG)
    offers.append(here.offer(Operation(True, 1, data(3, nbytes)), TAG))
    for wait in (work, expected[1][1], expected[0][1]):
        wait.wait(there, patience(there))
    assert [int(operation.buffer[0]) for operation in (expected[0][0], expected[1][0], late)] == [1, 2, 3]
    assert [offer.is_free for offer in offers] == [nbytes == FEW] * 4
    for offer in (offers[0], offers[2], offers[3]):
        offer.wait(here, patience(here))
    other = room(nbytes)
    there.expect(other, OTHER).wait(there, patience(there))
    offers[1].wait(here, patience(here))
    assert bool((other.buffer == 7).all())
    assert [there.early, there.expected] == [{}, {}], "nothing stays of a tag, of which each one-shot call has one"


def test_more_messages_than_a_socket_has_room_for_arrive(ends: tuple[Link, Link]) -> None:
    here, there = ends
    count = 3000
    offers = [here.offer(Operation(True, 1, data(number % 251, 8)), TAG) for number in range(count)]
    assert here.is_crowded
    waiting = patience(here, there)
    for number in range(count):
        operation = room(8)
        there.expect(operation, TAG).wait(there, patience(here, there))
        assert operation.buffer.tolist() == [number % 251] * 8
    for offer in offers:
        offer.wait(here, waiting)
    assert not here.is_crowded
    assert not there.is_crowded


def test_nods_are_of_a_tag_and_count_even_when_they_come_before_they_are_awaited(ends: tuple[Link, Link]) -> None:
    here, there = ends
    first, other = here.nod(TAG), here.nod(OTHER)
    there.nod(OTHER).wait(there, patience(there))
    other.wait(here, patience(here))
    with pytest.raises(LinkClosedError, match="no sign within the limit"):
        first.wait(here, patience(here, seconds=0.05))
    there.nod(TAG).wait(there, patience(there))
    again = there.nod(TAG)
    first.wait(here, patience(here))
    here.nod(TAG).wait(here, patience(here))
    again.wait(there, patience(there))
    for end in ends:
        end.look()
        assert [end.nods, end.early_nods] == [{}, set()]


def test_a_nod_that_was_told_before_the_end_counts_and_another_does_not_come(ends: tuple[Link, Link]) -> None:
    here, there = ends
    there.nod(TAG)
    told, missed = here.nod(TAG), here.nod(OTHER)
    there.close()
    told.wait(here, patience(here))
    with pytest.raises(LinkClosedError, match="the link to rank 1 is closed"):
        missed.wait(here, patience(here))
    with pytest.raises(ConnectionLostError):
        here.nod(TAG)


def test_another_size_is_refused_and_the_link_stands(ends: tuple[Link, Link]) -> None:
    here, there = ends
    here.offer(Operation(True, 1, data(1, 100)), TAG)
    with pytest.raises(UnreadableError, match="100 bytes came where 99 were expected"):
        there.expect(room(99), TAG).wait(there, patience(there))
    assert not there.is_closed()


@pytest.mark.parametrize("nbytes", [FEW, MANY])
def test_a_close_is_seen_by_both_and_what_was_done_before_counts(ends: tuple[Link, Link], nbytes: int) -> None:
    here, there = ends
    offers = [here.offer(Operation(True, 1, data(value, nbytes)), TAG) for value in (1, 2)]
    there.expect(room(nbytes), TAG).wait(there, patience(there))
    here.close()
    here.close()
    assert here.is_closed()
    assert there.is_closed()
    offers[0].wait(here, patience(here))
    second = room(nbytes)
    if nbytes == FEW or there.incoming is Rung.ARENA:
        # Nobody changes what is in a slab: it came, is read and counts, whatever became of its sender.
        there.expect(second, TAG).wait(there, patience(there))
        assert bool((second.buffer == 2).all())
    else:
        with pytest.raises(LinkClosedError):
            there.expect(second, TAG).wait(there, patience(there))  # it came, and is read, and does not count
    if nbytes == FEW:
        offers[1].wait(here, patience(here))
    else:
        with pytest.raises(LinkClosedError, match="rank 1"):
            offers[1].wait(here, patience(here))
    with pytest.raises(LinkClosedError):
        there.expect(room(nbytes), TAG).wait(there, patience(there))
    with pytest.raises(ConnectionLostError):
        there.offer(Operation(True, 0, data(1, nbytes)), TAG)


def test_who_offers_few_bytes_may_change_them_at_once(ends: tuple[Link, Link]) -> None:
    here, there = ends
    bytes_of_user = data(1, EAGER_NBYTES)
    here.offer(Operation(True, 1, bytes_of_user), TAG).wait(here, patience(here))
    bytes_of_user.fill_(9)
    read = room(EAGER_NBYTES)
    there.expect(read, TAG).wait(there, patience(there))
    assert bool((read.buffer == 1).all())


def test_a_sender_that_is_far_ahead_waits_and_memory_stays_bounded(ends: tuple[Link, Link]) -> None:
    here, there = ends
    offers = [here.offer(Operation(True, 1, data(number)), TAG) for number in range(EAGER_OFFERS + 3)]
    assert [offer.is_free for offer in offers] == [True] * EAGER_OFFERS + [False] * 3
    with pytest.raises(LinkClosedError, match="no sign within the limit"):
        offers[EAGER_OFFERS].wait(here, patience(here, seconds=0.05))
    for number in range(len(offers)):
        read = room()
        there.expect(read, TAG).wait(there, patience(there))
        assert bool((read.buffer == number).all())
    for offer in offers:
        offer.wait(here, patience(here))
    assert here.offer(Operation(True, 1, data(1)), TAG).is_free


def test_a_wait_ends_at_its_limit(ends: tuple[Link, Link]) -> None:
    with pytest.raises(LinkClosedError, match="no sign within the limit"):
        ends[0].expect(room(), TAG).wait(ends[0], patience(ends[0], seconds=0.05))


def test_an_end_that_goes_closes_the_other() -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends = [Link(peer, end, os.getpid(), Rung.ARENA, Rung.ARENA) for peer, end in ((1, first), (0, second))]
    ends[0].offer(Operation(True, 1, data(1)), TAG)
    del first
    ends.pop(0)
    assert ends[0].is_closed()


@pytest.mark.parametrize("is_eager", [False, True])
def test_runs_are_read_into_runs(is_eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricomm.transport.memory.link.EAGER_NBYTES", 1 << 16 if is_eager else 0)
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here, there = (Link(peer, end, os.getpid(), Rung.READ, Rung.READ) for peer, end in ((1, first), (0, second)))
    source, into = torch.arange(12.0).reshape(3, 4), torch.zeros(3, 4)
    theirs = runs_in(torch.tensor([[source.data_ptr() + 8, 8], [source.data_ptr() + 32, 16]]))
    ours = runs_in(torch.tensor([[into.data_ptr(), 4], [into.data_ptr() + 16, 20]]))
    nothing = torch.zeros(24, dtype=torch.uint8)
    offer = here.offer(Operation(True, 1, nothing, theirs), TAG)
    there.expect(Operation(False, 0, nothing, ours), TAG).wait(there, patience(there))
    offer.wait(here, patience(here))
    assert into.reshape(-1).tolist() == [2, 0, 0, 0, 3, 8, 9, 10, 11, 0, 0, 0]


def test_slabs_are_used_again() -> None:
    arena = Arena()
    first, file = arena.take(5000)
    assert file is not None
    os.close(file)
    assert first.memory.numel() == 8192
    arena.give_back(first)
    assert arena.take(6000) == (first, None)
    other, file = arena.take(6000)
    assert other.number == 2
    os.close(file)
