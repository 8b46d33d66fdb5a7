"""Operations that were made ready: whatever happens on the link, they do what those do that are posted one by one."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cases import of_random_draws
from tricomm.packing.runs import PIECE_NBYTES, runs_in
from tricomm.transport.base import NoConnections, Operation
from tricomm.transport.memory.connections import HostConnections
from tricomm.transport.memory.link import EAGER_NBYTES, EAGER_OFFERS, OFFERS_BEFORE_LOOKING, Link
from tricomm.transport.memory.prepared import PreparedNod, PreparedReceive, PreparedSend, prepared
from tricomm.transport.memory.protocol import Done, Here, Ready, decode
from tricomm.transport.memory.rungs import Rung
from tricomm.transport.memory.signals import Signals
from tricomm.transport.memory.transfers import Patience

TAG, OTHER = 3, 4
SOON = timedelta(seconds=5)
AT_ONCE = timedelta(0)
SIZES = (8, 8, 8, 5000, EAGER_NBYTES + 100)
"""Of the operations that a link has in each direction. The third is of another tag, the fourth receives runs."""

OF_OTHER, OF_RUNS = 2, 3
FEW_MESSAGES = 4096
"""Of a socket that has room for a few."""


Send = Callable[[bytes, int], int]
Key = tuple[bool | None, int, int]


class Recorded:
    """Two ends of a link, and what they tell each other."""

    def __init__(self, rung: Rung, is_narrow: bool) -> None:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ends = [Link(1 - rank, end, os.getpid(), rung, rung) for rank, end in enumerate(pair)]
        self.told: list[tuple[int, object]] = []
        for rank, link in enumerate(self.ends):
            link.send = recording(rank, link.send, self.told)  # type: ignore[method-assign]
            if is_narrow:
                pair[rank].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FEW_MESSAGES)


def recording(rank: int, send: Send, told: list[tuple[int, object]]) -> Send:
    """It holds no link, whose socket closes with it."""

    def sending(data: bytes, flags: int) -> int:
        sent = send(data, flags)
        message = decode(data)
        if isinstance(message, Ready) and not message.slab:
            message = message._replace(address=0)  # each has its own tensors
        told.append((rank, message))
        return sent

    return sending


class Way:
    """Both ends of a link with operations in both directions, which are made ready or not.

    Attributes:
        works: by (whether it sends; None for a nod, rank, which), of those that were started.
    """

    def __init__(self, is_short: bool, rung: Rung, is_narrow: bool) -> None:
        self.is_short, self.link = is_short, Recorded(rung, is_narrow)
        self.operations: dict[Key, Operation] = {}
        self.starts: dict[Key, Any] = {}
        self.works: dict[Key, Any] = {}
        for rank, link in enumerate(self.link.ends):
            self.starts[None, rank, 0] = PreparedNod(link, (link,)).start
            for which, nbytes in enumerate(SIZES):
                for is_send in (True, False):
                    buffer = torch.zeros(nbytes, dtype=torch.uint8)
                    runs = None
                    if which == OF_RUNS and not is_send:
                        at = buffer.data_ptr()
                        runs = runs_in(torch.tensor([[at, nbytes - 100], [at + nbytes - 100, 100]]))
                    operation = self.operations[is_send, rank, which] = Operation(is_send, 1 - rank, buffer, runs)
                    if is_short:
                        self.starts[is_send, rank, which] = prepared(operation, link, [link])

    def run(self, what: str, rank: int, number: int, salt: int) -> Any:
        """What comes of a command, to be compared."""
        link = self.link.ends[rank]
        try:
            match what:
                case "send" | "receive":
                    key = (what == "send", rank, number % len(SIZES))
                    return None if key in self.works else self.start(key, link, salt)
                case "nod" if (None, rank, 0) not in self.works:
                    return self.nod(link, rank, (TAG, OTHER)[number % 2])
                case "wait" if self.works:
                    return self.wait([*self.works][number % len(self.works)])
                case "catch up":
                    return link.has_read(), len(link.unread())
                case "tell":
                    for _ in range(number):
                        link.tell(Here(salt, bytes(16)))
                case "serve":
                    link.serve()
                case "close" if number < 4:
                    link.close()
        except RuntimeError as error:
            return type(error).__name__, str(error)
        return None

    def nod(self, link: Link, rank: int, tag: int) -> None:
        self.works[None, rank, 0] = self.starts[None, rank, 0](tag) if self.is_short else link.nod(tag)

    def wait(self, key: Key) -> list[int] | None:
        """The bytes of an operation that is over."""
        link, work = self.link.ends[key[1]], self.works[key]
        if self.is_short:
            work.wait(AT_ONCE)
        else:
            work.wait(link, Patience(AT_ONCE, (link,)))
        del self.works[key]
        return None if key[0] is None else self.operations[key].buffer.tolist()

    def start(self, key: Key, link: Link, salt: int) -> bool:
        """Whether there is something to wait for."""
        if key[0]:
            self.operations[key].buffer.fill_(salt % 251)
        if self.is_short:
            work = self.starts[key](tag_of(key[2]))
        elif key[0]:
            work = link.offer(self.operations[key], tag_of(key[2]))
            work = None if work.is_free else work
        else:
            work = link.expect(self.operations[key], tag_of(key[2]))
        if work is not None:
            self.works[key] = work
        return work is not None

    def state(self) -> list[Any]:
        """What the links know."""
        return [
            (
                {tag: len(found) for tag, found in link.expected.items()},
                {tag: [ready.number for ready in found] for tag, found in link.early.items()},
                {number: offer.is_free for number, offer in link.offers.items()},
                [*link.heres],
                {tag: found.has_come for tag, found in link.nods.items()},
                link.early_nods,
                [data for data, _ in link.backlog if not isinstance(decode(data), Ready)],
                len(link.backlog),
                [[slab.number for slab in link.free_slabs(nbytes)] for nbytes in SIZES],
                link.is_busy,
            )
            for link in self.link.ends
        ]


def tag_of(which: int) -> int:
    return OTHER if which == OF_OTHER else TAG


COMMANDS = st.lists(
    st.tuples(
        st.sampled_from(["send", "receive", "wait", "wait"] * 3 + ["catch up", "nod"] * 2 + ["tell", "serve", "close"]),
        st.integers(0, 1),
        st.integers(0, 40),
    ),
    max_size=60,
)
"""What is done, by whom; and with which operation, or how often."""

ROUND = [("receive", 1, 0), ("send", 0, 0), ("wait", 1, 0), ("catch up", 0, 0)]
SECOND_FIRST = [("receive", 1, 0), ("receive", 1, 1), ("send", 0, 0), ("send", 0, 1), ("wait", 1, 1), ("wait", 1, 0)]
OTHER_TAG = [("receive", 1, 0), ("receive", 1, 2), ("send", 0, 2), ("send", 0, 0), ("wait", 1, 0), ("wait", 1, 0)]
RUNS = [("receive", 1, 3), ("send", 0, 3), ("wait", 1, 0)]
RECEIVES, SENDS, WAITS = (
    [(what, rank, at) for at in range(3)] for what, rank in (("receive", 1), ("send", 0), ("wait", 1))
)
NODS = [("nod", 0, 0), ("nod", 1, 0), ("wait", 0, 0), ("wait", 0, 0)]
CATCH_UP = [("catch up", 0, 0)]
WARM = [*RECEIVES, *SENDS, *WAITS[:1] * 3, *CATCH_UP]
NEARLY_FULL = [
    command
    for count in range(16)
    for command in (
        *(*RECEIVES, ("tell", 0, count), *SENDS, ("tell", 1, count), *WAITS[:1] * 3),
        *(*NODS[:1], ("serve", 0, 0), ("serve", 1, 0), ("tell", 0, 1), ("tell", 1, 1), *CATCH_UP) * 2,
    )
]
"""The socket has room for some of what follows."""

EARLY = [("send", 0, 0), ("serve", 1, 0), ("receive", 1, 0)]
AHEAD = [("send", 0, 0)] * (EAGER_OFFERS + 2)
WARM_AHEAD = [*AHEAD[:10], *[ROUND[0], ROUND[2]] * 10, *CATCH_UP, *WARM]


@of_random_draws("TRICOMM_FUZZ_PREPARED", 300)
@given(commands=COMMANDS, rung=st.sampled_from([Rung.READ, Rung.ARENA]), is_narrow=st.booleans())
@example(commands=ROUND * 3, rung=Rung.READ, is_narrow=False)
@example(commands=[*AHEAD, *[*ROUND[:1], *ROUND[2:3]] * 20, *ROUND * 3], rung=Rung.ARENA, is_narrow=False)
@example(commands=[*WARM_AHEAD, *SENDS[:1] * 5, *[ROUND[0], ROUND[2]] * 2, *SENDS[1:]], rung=Rung.READ, is_narrow=False)
@example(commands=[*WARM, ("tell", 0, 40), ("serve", 1, 0), *ROUND * 9], rung=Rung.READ, is_narrow=True)
@example(commands=[*WARM, *EARLY, ("tell", 1, 40), ("serve", 0, 0), *ROUND[2:] * 9], rung=Rung.READ, is_narrow=True)
@example(commands=[*WARM, ("close", 0, 0), *SENDS, *NODS], rung=Rung.READ, is_narrow=False)
@example(commands=[*NODS, *ROUND, *NODS * 2], rung=Rung.READ, is_narrow=False)
@example(commands=[*NODS[:1], ("nod", 1, 1), *NODS[2:] * 2, *NODS], rung=Rung.READ, is_narrow=False)
@example(commands=[*NODS[:2], ("close", 0, 0), *NODS[2:], *NODS], rung=Rung.READ, is_narrow=False)
@example(commands=[("tell", 0, 40), *NODS[:2], *[("serve", 1, 0), ("tell", 0, 1)] * 20], rung=Rung.READ, is_narrow=True)
@example(commands=NEARLY_FULL, rung=Rung.READ, is_narrow=True)
@example(commands=[*SECOND_FIRST * 3, *OTHER_TAG * 3, *RUNS * 2], rung=Rung.READ, is_narrow=False)
@example(commands=[*ROUND, *ROUND[:2], ("close", 0, 0), *ROUND[2:], *ROUND], rung=Rung.READ, is_narrow=False)
@example(commands=[*ROUND, ("receive", 1, 4), *ROUND, ("send", 0, 4)], rung=Rung.READ, is_narrow=False)
def test_both_ways_are_the_same_to_the_user_and_to_the_peer(
    commands: list[tuple[str, int, int]], rung: Rung, is_narrow: bool
) -> None:
    short, ordinary = Way(True, rung, is_narrow), Way(False, rung, is_narrow)
    for salt, command in enumerate(commands):
        assert short.run(*command, salt) == ordinary.run(*command, salt), (salt, command)
        assert short.state() == ordinary.state(), (salt, command)
    assert short.link.told == ordinary.link.told


def linked() -> tuple[Link, Link]:
    first, second = Recorded(Rung.READ, False).ends
    return first, second


def test_a_warm_operation_enters_one_function_at_each_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the ordinary way, once a slab is there."""
    here, there = linked()
    source, into = (torch.zeros(100, dtype=torch.uint8) for _ in range(2))
    send = prepared(Operation(True, 1, source), here, [here])
    receive = prepared(Operation(False, 0, into), there, [there])
    assert send is not None
    assert receive is not None
    for call in range(5):
        source.fill_(call)
        if call == 2:
            for name in ("offer", "expect", "look", "serve", "take", "read", "done", "tell", "flush", "wait"):
                for owner in (Signals, Link):
                    monkeypatch.delattr(owner, name, raising=False)
        work = receive(TAG)
        assert send(TAG) is None
        work.wait(SOON)
        assert bool((into == call).all())
        assert here.has_read()


def test_where_calls_end_with_nods_these_say_that_few_bytes_are_read() -> None:
    """More than those are told of by themselves: their sender waits for that before it nods."""
    record = Recorded(Rung.ARENA, False)
    here, there = record.ends
    sizes = (100, EAGER_NBYTES, EAGER_NBYTES + 1)
    sources, places = ([torch.zeros(nbytes, dtype=torch.uint8) for nbytes in sizes] for _ in range(2))
    sends = [prepared(Operation(True, 1, source), here, [here], True) for source in sources]
    receives = [prepared(Operation(False, 0, place), there, [there], True) for place in places]
    nods = [PreparedNod(link, (link,)).start for link in record.ends]
    for call in range(5):
        del record.told[:]
        works: list[Any] = []
        for source, send, receive in zip(sources, sends, receives, strict=True):
            assert send is not None
            assert receive is not None
            source.fill_(call + 1)
            works += receive(TAG), send(TAG)
        for work in (*works[::2], works[-1]):
            work.wait(SOON)
        assert all(bool((place == call + 1).all()) for place in places)
        if call:  # the first finds no slabs, and goes the ordinary way
            assert sum(isinstance(message, Done) for _, message in record.told) == 1
        theirs, ours = nods[1](TAG), nods[0](TAG) if call % 2 else None
        if ours is None:
            here.serve()  # it comes before it is expected
            ours = nods[0](TAG)
        ours.wait(SOON)
        theirs.wait(SOON)
        assert not here.offers
    assert len(there.slabs) == len(sizes)


def test_operations_that_go_in_pieces_or_by_no_link_are_not_made_ready() -> None:
    here, _ = linked()
    connections = HostConnections(NoConnections(), {1: here}, {})
    buffers = [torch.zeros(nbytes, dtype=torch.uint8) for nbytes in (PIECE_NBYTES + 1, PIECE_NBYTES, 8)]
    assert [
        connections.prepare(Operation(is_send, peer, buffer), False) is None
        for is_send in (False, True)
        for peer, buffer in zip((1, 1, 2), buffers, strict=True)
    ] == [True, False, True] * 2


def test_a_send_looks_for_what_was_read_before_it_takes_more_memory() -> None:
    here, there = linked()
    source = torch.zeros(100, dtype=torch.uint8)
    send = PreparedSend(Operation(True, 1, source), here, (here,))
    receive = PreparedReceive(Operation(False, 0, source.clone()), there, (there,))
    for _ in range(50):
        assert send.start(TAG) is None
        receive.start(TAG).wait(SOON)
    assert len(there.slabs) <= OFFERS_BEFORE_LOOKING
