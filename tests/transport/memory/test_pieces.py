"""Many bytes go piece by piece, by both ends at once: how boxes are cut, and two ends of links in this process."""

import gc
import os
import socket
import threading
import weakref
from datetime import timedelta
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tricomm.kernels.reference import InWords, paired_views
from tricomm.kernels.table import StridedBox, contiguous_strides
from tricomm.packing.runs import Pieces, cut
from tricomm.packing.staging import TensorBox
from tricomm.transport.base import NoConnections, Operation
from tricomm.transport.memory.connections import HostConnections
from tricomm.transport.memory.link import Link
from tricomm.transport.memory.reading import UnreadableError
from tricomm.transport.memory.rungs import Rung
from tricomm.transport.memory.signals import LinkClosedError
from tricomm.transport.memory.transfers import Patience

TAG = 3
PIECE_NBYTES = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricomm.packing.runs.PIECE_NBYTES", PIECE_NBYTES)


def linked(rung: Rung = Rung.READ) -> tuple[Link, Link]:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Link(1, first, os.getpid(), rung, rung), Link(0, second, os.getpid(), rung, rung)


def patience(*links: Link, seconds: float = 5.0) -> Patience:
    return Patience(timedelta(seconds=seconds), links)


def places(box: StridedBox) -> dict[int, int]:
    """Where each word of a box is packed, and where it is in the tensor."""
    found = {}
    for at in product(*map(range, box.shape)):
        packed = box.packed_offset + sum(map(int.__mul__, at, box.packed_strides))
        found[packed] = box.tensor_offset + sum(map(int.__mul__, at, box.tensor_strides))
    return found


@st.composite
def boxes(draw: st.DrawFn) -> StridedBox:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    around = tuple(extent + draw(st.integers(0, 3)) for extent in shape)
    order = draw(st.permutations(range(len(shape))))
    strides = [0] * len(shape)
    for at, stride in zip(order, contiguous_strides([around[at] for at in order]), strict=True):
        strides[at] = stride
    packed = contiguous_strides(around) if draw(st.booleans()) else tuple(strides)
    return StridedBox(shape, draw(st.integers(0, 9)), tuple(strides), draw(st.integers(0, 40)), packed, 1)


@given(box=boxes(), size=st.integers(1, 40))
def test_parts_of_a_box_are_its_words_each_in_its_piece(box: StridedBox, size: int) -> None:
    found: dict[int, int] = {}
    count = 0
    for piece, part in cut(box, size):
        of_part = places(part)
        assert {packed // size for packed in of_part} == {piece}
        found |= of_part
        count += prod(part.shape)
    assert found == places(box)
    assert count == len(found)


def of_columns(tensor: torch.Tensor, packs: bool) -> Pieces:
    """The left half of a float32 matrix, as pieces."""
    rows, columns = tensor.shape[0], tensor.shape[1] // 2
    box = StridedBox((rows, columns), 0, (2 * columns, 1), 0, (columns, 1), 4)

    def copies(parts, memory, place_nbytes):
        packed = InWords(memory.view(torch.float32))
        pairs = [*paired_views(InWords(tensor), [one.box for one in parts], packed, place_nbytes)]

        def copy() -> None:
            for part, chunk in pairs:
                if packs:
                    chunk.copy_(part.view(chunk.dtype))
                else:
                    part.view(chunk.dtype).copy_(chunk)

        return copy

    return Pieces([TensorBox(0, box, torch.float32)], rows * columns * 4, copies)


NOTHING = torch.zeros(0, dtype=torch.uint8)


@pytest.mark.parametrize("rung", [Rung.READ, Rung.ARENA], ids=lambda rung: rung.value)
@pytest.mark.parametrize("sends_pieces", [False, True])
@pytest.mark.parametrize("receives_pieces", [False, True])
def test_pieces_arrive_while_others_are_waited_for(rung: Rung, sends_pieces: bool, receives_pieces: bool) -> None:
    """Each end waits for one transfer after the other, in another order; between them all have to go on."""
    count, shape = 4, (10, 14)
    here, there = linked(rung)
    sources = [torch.arange(140.0).reshape(shape) + 1000 * at for at in range(count)]
    results = [torch.zeros(shape) for _ in range(count)]

    def operation(is_send: bool, tensor: torch.Tensor) -> Operation:
        if sends_pieces if is_send else receives_pieces:
            return Operation(is_send, int(is_send), NOTHING, of_columns(tensor, is_send))
        if is_send:
            return Operation(True, 1, tensor[:, :7].contiguous().reshape(-1).view(torch.uint8))
        return Operation(False, 0, tensor.view(-1)[:70].view(torch.uint8))

    def send() -> None:
        works = [here.offer(operation(True, one), TAG) for one in sources]
        # Few bytes keep their place among many.
        works.append(here.offer(Operation(True, 1, torch.full((8,), 7, dtype=torch.uint8)), TAG))
        for at, work in enumerate(works):
            work.wait(here, patience(here))
            if at < count:
                sources[at].fill_(-1.0)

    sender = threading.Thread(target=send)
    sender.start()
    few = Operation(False, 0, torch.zeros(8, dtype=torch.uint8))
    arrivals = [there.expect(operation(False, one), TAG) for one in results]
    last = there.expect(few, TAG)
    for work in (arrivals[2], arrivals[0], last, arrivals[3], arrivals[1]):
        work.wait(there, patience(there))
    sender.join()
    for at, result in enumerate(results):
        expected = (torch.arange(140.0).reshape(shape) + 1000 * at)[:, :7]
        assert torch.equal(result[:, :7] if receives_pieces else result.view(-1)[:70].view(10, 7), expected)
    assert few.buffer.tolist() == [7] * 8
    there.look()
    here.look()
    assert not here.unread()
    assert not here.is_busy
    assert not there.is_busy


def test_a_rank_that_waits_for_one_peer_serves_the_others() -> None:
    """Three ranks in a ring: each receives before it looks after what it sends. None may wait for another for ever."""
    count, nbytes = 3, 10 * PIECE_NBYTES + 5
    pairs = [linked() for _ in range(count)]  # from each rank to the next
    results = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            onwards, back = pairs[rank][0], pairs[rank - 1][1]
            onwards.peer, back.peer = (rank + 1) % count, (rank - 1) % count
            arrival = back.expect(Operation(False, back.peer, results[rank]), TAG)
            departure = onwards.offer(Operation(True, 1, torch.full((nbytes,), rank + 1, dtype=torch.uint8)), TAG)
            waiting = patience(onwards, back)
            arrival.wait(back, waiting)
            departure.wait(onwards, waiting)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [set(result.tolist()) for result in results] == [{3}, {1}, {2}]


def test_memory_is_that_of_few_pieces_whatever_is_sent() -> None:
    here, there = linked()
    for _ in range(3):
        offered = here.offer(Operation(True, 1, torch.ones(40 * PIECE_NBYTES, dtype=torch.uint8)), TAG)
        assert not offered.is_free
        assert len(here.unread()) == 2
        with pytest.raises(LinkClosedError, match="no sign within the limit"):
            offered.wait(here, patience(here, seconds=0.02))
        arrival = there.expect(Operation(False, 0, torch.zeros(40 * PIECE_NBYTES, dtype=torch.uint8)), TAG)
        receiver = threading.Thread(target=arrival.wait, args=(there, patience(there)))
        receiver.start()
        offered.wait(here, patience(here))
        receiver.join()
        there.look()
        for one in here.unread():
            one.wait_read(here, patience(here))
    assert len(there.slabs) == 2


def test_links_that_pack_at_the_same_time_have_a_piece_under_way_each_and_one_that_is_alone_two() -> None:
    pairs = {1: linked(), 2: linked()}
    here, there = ({peer: pair[at] for peer, pair in pairs.items()} for at in (0, 1))
    here[2].peer = 2
    connections = HostConnections(NoConnections(), here, {})
    for call in range(3):
        counts = {1: 5, 2: 9}
        sources = {peer: torch.full((count * PIECE_NBYTES,), call, dtype=torch.uint8) for peer, count in counts.items()}
        results = {peer: torch.ones_like(source) for peer, source in sources.items()}
        connections.post([Operation(True, peer, source) for peer, source in sources.items()], TAG)
        for peer, result in results.items():
            there[peer].expect(Operation(False, 0, result), TAG)
        under_way = []
        while here[2].leaving:
            under_way.append((len(here[1].unread()), len(here[2].unread())))
            for ends in pairs.values():
                ends[1].serve()
                ends[0].serve()
        for ends in pairs.values():
            ends[1].serve()
            ends[0].serve()
        assert under_way == [(1, 1)] * 4 + [(1, 2), (0, 2)]
        assert all(torch.equal(results[peer], source) for peer, source in sources.items())


@pytest.mark.parametrize("nbytes", [PIECE_NBYTES * 4, 8])
def test_another_size_is_refused(nbytes: int) -> None:
    here, there = linked()
    here.offer(Operation(True, 1, torch.ones(nbytes, dtype=torch.uint8)), TAG)
    expected = PIECE_NBYTES * 5
    arrival = there.expect(Operation(False, 0, torch.zeros(expected, dtype=torch.uint8)), TAG)
    with pytest.raises(UnreadableError, match=f"{nbytes} bytes came where {expected} were expected"):
        arrival.wait(there, patience(there))


def test_a_close_ends_both_waits_and_what_came_whole_counts() -> None:
    here, there = linked()
    size = 2 * PIECE_NBYTES
    here.offer(Operation(True, 1, torch.ones(size, dtype=torch.uint8)), TAG).wait(here, patience(here))
    departure = here.offer(Operation(True, 1, torch.ones(size, dtype=torch.uint8)), TAG)
    here.close()
    whole, part = (Operation(False, 0, torch.zeros(size, dtype=torch.uint8)) for _ in range(2))
    arrivals = there.expect(whole, TAG), there.expect(part, TAG)
    arrivals[0].wait(there, patience(there))
    assert bool((whole.buffer == 1).all())
    with pytest.raises(LinkClosedError):
        arrivals[1].wait(there, patience(there))
    with pytest.raises(LinkClosedError):
        departure.wait(here, patience(here))


def test_a_link_that_has_ended_does_not_disturb_who_waits_for_another() -> None:
    here, there = linked()
    other, gone = linked()
    other.peer = 2
    other.offer(Operation(True, 2, torch.ones(9 * PIECE_NBYTES, dtype=torch.uint8)), TAG)
    gone.close()
    arrival = here.expect(Operation(False, 1, torch.zeros(100, dtype=torch.uint8)), TAG)
    with pytest.raises(LinkClosedError, match="no sign within the limit"):
        arrival.wait(here, patience(here, other, seconds=0.05))
    there.offer(Operation(True, 0, torch.ones(100, dtype=torch.uint8)), TAG)
    arrival.wait(here, patience(here, other))


def test_links_that_were_waited_for_together_go_when_nobody_has_them() -> None:
    here, other = linked()[0], linked()[0]
    other.peer = 2
    for first, second in ((here, other), (other, here)):
        assert first.wait_with({2: second}, 0) == {1: True, 2: True}  # their other ends have gone
    gone = [weakref.ref(here), weakref.ref(other)]
    gc.disable()
    try:
        del here, other, first, second
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
