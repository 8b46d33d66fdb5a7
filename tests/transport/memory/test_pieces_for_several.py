"""What several ranks of a host get is packed once for all of them, as long as they keep up with each other."""

import gc
import os
import socket
import threading
import weakref
from datetime import timedelta

import pytest
import torch

import tricomm
from tests.transport.memory.rungs import forced
from tests.transport.memory.test_failures import DEEDS, POINTS, TIMEOUT_SECONDS, at_point, attempt
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.transport.base import NoConnections, Operation
from tricomm.transport.memory import pieces
from tricomm.transport.memory.connections import HostConnections
from tricomm.transport.memory.link import Link
from tricomm.transport.memory.pieces import Common
from tricomm.transport.memory.rungs import Rung
from tricomm.transport.memory.transfers import Patience

TAG = 3
PIECE_NBYTES = 64
PEERS = (1, 2, 3)
COUNT = 11
NBYTES = COUNT * PIECE_NBYTES - 5


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricomm.packing.runs.PIECE_NBYTES", PIECE_NBYTES)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At which byte each piece began that was packed for several."""
    places: list[int] = []
    pack = pieces.pack_piece

    def packing(operation, place, nbytes, slab):
        places.append(place)
        pack(operation, place, nbytes, slab)

    monkeypatch.setattr(pieces, "pack_piece", packing)
    return places


class Star:
    """Rank 0, and its links with three others."""

    def __init__(self) -> None:
        pairs = {peer: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for peer in PEERS}
        self.here = {peer: Link(peer, one, os.getpid(), Rung.READ, Rung.READ) for peer, (one, _) in pairs.items()}
        self.there = {peer: Link(0, other, os.getpid(), Rung.READ, Rung.READ) for peer, (_, other) in pairs.items()}
        self.connections = HostConnections(NoConnections(), self.here, {})

    def post(self, buffer: torch.Tensor) -> list:
        return self.connections.post([Operation(True, peer, buffer) for peer in PEERS], TAG)

    def expect(self, peer: int) -> tuple[torch.Tensor, object]:
        result = torch.zeros(NBYTES, dtype=torch.uint8)
        return result, self.there[peer].expect(Operation(False, 0, result), TAG)

    def slots(self) -> int:
        return len({slot for link in self.here.values() for slot in link._slots})

    def serve(self, peers: tuple[int, ...]) -> None:
        for peer in peers:
            self.there[peer].serve()
            self.here[peer].serve()


def data(salt: int) -> torch.Tensor:
    return ((torch.arange(NBYTES) + salt) % 251).to(torch.uint8)


def test_each_piece_is_packed_once_for_those_that_keep_up(packed: list[int]) -> None:
    star = Star()
    for call in range(3):
        packed.clear()
        expected = [star.expect(peer) for peer in PEERS]
        star.post(data(call))
        for _ in range(COUNT):
            star.serve(PEERS)
        for result, _ in expected:
            assert torch.equal(result, data(call))
        assert packed == [*range(0, NBYTES, PIECE_NBYTES)]
        assert not any(link.is_busy for link in star.here.values())
        assert not any(link.unread() for link in star.here.values())
    assert star.slots() <= pieces.IN_STEP


def test_who_does_not_read_holds_nobody_up_for_long_and_gets_all_in_the_end(packed: list[int]) -> None:
    star = Star()
    for call in range(3):
        buffer = data(call)
        quick = [star.expect(peer) for peer in PEERS[:2]]
        works = star.post(buffer)
        threads = [
            threading.Thread(target=arrival.wait, args=(star.there[peer], Patience(timedelta(seconds=20), ())))
            for peer, (_, arrival) in zip(PEERS, quick, strict=False)
        ]
        for thread in threads:
            thread.start()
        for _, work in works[:2]:
            star.connections.wait(work, timedelta(seconds=20))
        for thread in threads:
            thread.join()
        for result, _ in quick:
            assert torch.equal(result, buffer)
        _, (_, wait) = works[2]
        assert not wait.__self__.is_free
        late, arrival = star.expect(PEERS[2])
        while not arrival.is_whole:
            star.serve(PEERS[2:])
        assert torch.equal(late, data(call))
        assert wait.__self__.is_free
        star.serve(PEERS)
    assert star.slots() <= 2 * len(PEERS)


def test_nothing_of_the_user_is_kept_when_all_is_sent() -> None:
    star = Star()
    buffer = data(0)
    gone = weakref.ref(buffer)
    expected = [star.expect(peer) for peer in PEERS]
    works = star.post(buffer)
    for _ in range(COUNT):
        star.serve(PEERS)
    links = [weakref.ref(link) for link in star.here.values()]
    gc.disable()
    try:
        del buffer, works
        assert gone() is None
        del star, expected
        assert [link() for link in links] == [None] * len(PEERS)
    finally:
        gc.enable()


def test_slabs_are_closed_with_those_that_have_them() -> None:
    def once() -> None:
        star = Star()
        expected = [star.expect(peer) for peer in PEERS]
        star.post(data(0))
        for _ in range(COUNT):
            star.serve(PEERS)
        assert all(torch.equal(result, data(0)) for result, _ in expected)

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    once()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def replicate(rank: int, kind: str, rung: str) -> tuple[int, int]:
    """(pieces packed for several, pieces told of) of calls with one mover, each of which is compared."""
    shape = (64, 1024)
    after, mesh = {
        "whole": ((Replicate(),), Mesh([1, 2, 3], ("dp",))),
        "columns": ((Shard(1), Replicate()), Mesh([[0, 1], [2, 3]], ("tp", "dp"))),
    }[kind]
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), shape, "float32")
    destination = ShardingSpec(mesh, after, shape, "float32")
    counts = [0, 0]
    with forced(rung, rank, 1 << 14), pytest.MonkeyPatch.context() as patch:
        pack, packed = pieces.pack_piece, Common.packed

        def packing(*arguments):
            counts[0] += 1
            return pack(*arguments)

        def giving(*arguments):
            found = packed(*arguments)
            counts[1] += found is not None
            return found

        patch.setattr(pieces, "pack_piece", packing)
        patch.setattr(Common, "packed", giving)
        mover = Resharder(source, destination, transport="memory", timeout_seconds=20, channel=f"{kind}, {rung}")
        for step in range(3):
            full = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + step
            output = mover(full if rank == 0 else None)
            if rank in mesh:
                expected = full if kind == "whole" else full.chunk(2, dim=1)[rank // 2]
                assert output is not None
                assert torch.equal(output, expected)
    assert isinstance(mover.plan.moves[0].strategies[0], tricomm.SendRecv)
    return counts[0], counts[1]


@pytest.mark.parametrize("rung", ["pieces", "pieces in an arena"])
@pytest.mark.parametrize("kind", ["whole", "columns"])
def test_replicas_of_a_host_share_what_is_packed(ranks: Ranks, kind: str, rung: str) -> None:
    (packed, told), *others = ranks.run(replicate, kind, rung)
    assert 0 < packed < told
    assert {*others} == {(0, 0)}


def end_among_replicas(rank: int, point: str, deed: str) -> tuple[str, str, float]:
    """A call that works, then one in which the sender or the first of three receivers comes to its end."""
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (64, 4096), "float32")
    destination = ShardingSpec(Mesh(PEERS, ("x",)), (Replicate(),), (64, 4096), "float32")
    mover = Resharder(source, destination, timeout_seconds=TIMEOUT_SECONDS, confirm=True, transport="memory")
    tensor = torch.ones(64, 4096) if rank == 0 else None
    with forced("pieces", rank, 1 << 15), pytest.MonkeyPatch.context() as patch:
        mover(tensor)
        at_point(point, rank, DEEDS[deed], patch)
        return attempt(lambda: mover(tensor))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("point", "deed"),
    [("before READY", "killed"), ("before the read", "killed"), ("before DONE", "killed"), ("before DONE", "stopped")],
)
def test_one_of_several_that_ends_is_named_in_time(point: str, deed: str) -> None:
    victim = POINTS[point][0]
    with Ranks(4, timeout_seconds=30) as doomed:
        doomed.start(end_among_replicas, point, deed)
        for kind, text, seconds in doomed.collect([rank for rank in range(4) if rank != victim]):
            assert kind == "TransportError", text
            assert f"rank {victim} " in text.split(";")[0]
            assert seconds <= TIMEOUT_SECONDS
            assert deed == "stopped" or seconds < TIMEOUT_SECONDS / 2, "a death is known at once"
