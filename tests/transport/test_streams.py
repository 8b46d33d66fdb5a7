"""Background runs beside the compute of a GPU: which events they wait for, seen through a recording stream context."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tests.oracle import pick, require_equal
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import EdgeTensor, Link

SHAPE = (8, 6)
SOURCE = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), SHAPE, "float32")
DESTINATION = ShardingSpec(Mesh([2], ("x",)), (Replicate(),))
RANKS = (0, 1, 2)


class Event(int):
    """A number for an event."""

    def query(self) -> bool:
        return True


class Recorder:
    """A StreamContext of which every event is a number, and every call a line."""

    def __init__(self) -> None:
        self.events = 0
        self.lines: list[str] = []

    def record_event(self) -> int:
        self.events += 1
        self.lines.append(f"event {self.events}")
        return Event(self.events)

    @contextmanager
    def after(self, events: Sequence[int], *tensors: torch.Tensor | None) -> Iterator[None]:
        assert threading.current_thread().name.startswith("tricomm"), "the caller does not wait"
        after = " and ".join(map(str, events))
        self.lines.append(f"begin after {after}, keeping {sum(tensor is not None for tensor in tensors)}")
        yield

    def record_end(self) -> int:
        self.events += 1
        self.lines.append(f"end {self.events}")
        return self.events

    def wait_event(self, event: int) -> None:
        is_caller = threading.current_thread() is threading.main_thread()
        self.lines.append(f"wait for {event}" if is_caller else f"another stream waits for {event}")


def opened(mover: Resharder) -> list[str]:
    """Let the background runs of a Resharder be recorded."""
    recorder = Recorder()
    mover._session.channel.stream_context = recorder
    return recorder.lines


def background_run(rank: int) -> list[str]:
    if rank not in RANKS:
        return []
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=10)
    mover.connect()
    lines = opened(mover)
    full = torch.arange(48.0).reshape(SHAPE)
    tensor = pick(full, SOURCE, rank) if rank in SOURCE.mesh else None
    handle = mover.start(tensor)
    handle.wait()
    output = mover(tensor)
    if output is not None:
        require_equal(output, full, "after a background run")
    event = mover.record_event()
    assert event == 3
    mover.start(tensor, out=output, after=event).wait()
    return lines


def test_a_run_waits_for_the_caller_and_the_caller_for_it(ranks: Ranks) -> None:
    for lines in ranks.run(background_run)[:3]:
        assert lines == [
            *("event 1", "begin after 1, keeping 1", "end 2", "wait for 2"),
            "wait for 2",  # the direct call comes after what ran before
            *("event 3", "begin after 3, keeping 1", "end 4", "wait for 4"),
        ]


def one_behind_another(rank: int) -> list[str]:
    if rank not in RANKS:
        return []
    first, second = (Resharder(SOURCE, DESTINATION, timeout_seconds=10, channel=name) for name in ("first", "second"))
    full = torch.arange(48.0).reshape(SHAPE)
    tensor = pick(full, SOURCE, rank) if rank in SOURCE.mesh else None
    for mover in (first, second):
        mover.connect()
    lines = opened(first)
    opened(second)
    before = first.start(tensor)
    second.start(tensor, depends_on=[before]).wait()
    before.wait()
    return lines


def test_a_run_behind_another_waits_for_it_on_the_device(ranks: Ranks) -> None:
    """Not only on the host, where a run has ended as soon as it is queued."""
    for lines in ranks.run(one_behind_another)[:3]:
        assert lines == ["event 1", "begin after 1, keeping 1", "end 2", "another stream waits for 2", "wait for 2"]


def receives_in_turn(rank: int) -> list[str]:
    """Two slots, four microbatches: a receive waits for what read its buffer before, not for all that was queued."""
    if rank not in RANKS:
        return []
    link = Link("events", [EdgeTensor(SOURCE, DESTINATION)], microbatches=4, slots=(2, None), timeout_seconds=10)
    link.connect()
    if rank != 2:
        for m in range(4):
            link.send(torch.full(SOURCE.local_shape(rank), float(m)), m)
        link.flush()
        return []
    lines = opened(link.forward.resharders[0])
    for m in range(4):
        handle = link.recv(m)
        assert handle.wait()[0, 0] == m
        handle.release()
    return lines


def test_a_posted_receive_waits_for_its_buffer_only(ranks: Ranks) -> None:
    lines = ranks.run(receives_in_turn)[2]
    begins = [line for line in lines if line.startswith("begin")]
    # Events: 1 start, 2 end, 3 release; 4, 5, 6 for the other buffer; then from the events of the releases on.
    assert [line.split(",")[0] for line in begins] == [f"begin after {event}" for event in (1, 4, 3, 6)]


def sends_before_a_flush(rank: int) -> list[str]:
    """What the sender's stream waits for, when every send has been queued before the next one."""
    if rank not in RANKS:
        return []
    link = Link("sends", [EdgeTensor(SOURCE, DESTINATION)], microbatches=4, timeout_seconds=10)
    link.connect()
    if rank == 2:
        for m in range(4):
            assert link.recv(m).wait()[0, 0] == m
        return []
    lines = opened(link.forward.resharders[0])
    for m in range(4):
        handle = link.send(torch.full(SOURCE.local_shape(rank), float(m)), m)
        while not handle.done():
            time.sleep(0.001)
    lines.append("flush")
    link.flush()
    return lines


def test_a_send_holds_up_nothing_before_the_flush(ranks: Ranks) -> None:
    """On a GPU a send is done when it is queued, so a wait for the one before would put compute behind it."""
    for lines in ranks.run(sends_before_a_flush)[:2]:
        joins = [line for line in lines if line.startswith(("wait for", "flush"))]
        # Marks 2, 4, 6, 8 end the sends; whoever goes on after the flush goes on after the last of them.
        assert joins == ["flush", "wait for 6", "wait for 8"], lines


def new_memory_after_a_mark(rank: int) -> list[str]:
    """A receive into a new tensor that is to begin after an event which is older than the tensor."""
    if rank not in RANKS:
        return []
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=10)
    mover.connect()
    lines = opened(mover)
    full = torch.arange(48.0).reshape(SHAPE)
    tensor = pick(full, SOURCE, rank) if rank in SOURCE.mesh else None
    old = mover.record_event()
    mover.start(tensor, after=old).wait()
    out = torch.zeros(DESTINATION.resolved(SOURCE).local_shape(rank)) if rank in DESTINATION.mesh else None
    mover.start(tensor, out=out, after=old).wait()
    return [line.split(",")[0] for line in lines if line.startswith("begin")]


def test_a_new_tensor_waits_for_whoever_used_its_memory(ranks: Ranks) -> None:
    """The allocator gives memory back in the order of the current stream, not in that of the event."""
    found = ranks.run(new_memory_after_a_mark)
    assert found[2] == ["begin after 1 and 2", "begin after 1"]
    assert found[0] == found[1] == ["begin after 1", "begin after 1"], "nothing new is written there"
