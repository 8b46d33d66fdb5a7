"""What tricomm relies on of CUDA streams and NCCL, one rule each: the same code on a GPU and on the tests' stand-in.

Two ranks keep a rule together, each with its own ``Bed``. Where the stand-in is stricter than a GPU has to be, the rule
says what it found by raising ``Laxer``, which is no failure on a GPU.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch

from tricomm.transport.accelerator import Accelerator, DeviceBackend, DeviceWork
from tricomm.transport.base import Operation
from tricomm.transport.nccl import connect, post_group

SECONDS = 8.0
"""For which a rule waits for what must happen."""
MEANWHILE_SECONDS = 0.3
"""For which it looks whether something happens that must not."""
NBYTES = 4096


class Laxer(Exception):  # noqa: N818 - no error
    """This device is laxer than the rule."""


class Bed(Protocol):
    """One of two ranks and its device."""

    rank: int
    accelerator: Accelerator
    device: torch.device
    name: str
    """Of the rule, or how else its stores are told apart."""

    def store(self, name: str) -> Any:
        """A store that both ranks share, of this name alone."""
        ...

    def barrier(self) -> None:
        """Return when the other rank's host is here, too."""
        ...

    def compute(self, seconds: float) -> None:
        """Queue a kernel on the current stream that takes about so long."""
        ...


@dataclass(slots=True)
class Lane:
    """A communicator of both ranks."""

    bed: Bed
    backend: DeviceBackend

    def post(self, *messages: tuple[bool, torch.Tensor]) -> DeviceWork:
        """Queue a group of (whether to send, tensor) with the other rank."""
        bed = self.bed
        operations = [Operation(is_send, 1 - bed.rank, tensor) for is_send, tensor in messages]
        return post_group(bed.accelerator, self.backend, bed.device, {0: 0, 1: 1}, operations)

    def send(self, value: int) -> DeviceWork:
        """Send bytes of this value."""
        return self.post((True, filled(self.bed, value)))

    def exchange(self) -> None:
        """Both ranks send and receive, to the end."""
        found = filled(self.bed, 0)
        self.post((True, filled(self.bed, 7)), (False, found)).synchronize()
        finish(self.bed)
        require(value_of(found) == 7, f"7 was sent, {value_of(found)} came")


@dataclass(slots=True)
class Abortion:
    """A backend that is aborted on a thread of its own."""

    lane: Lane
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.lane.backend.abort, daemon=True)
        self.thread.start()

    def join(self) -> None:
        """Return when it is over."""
        self.thread.join(SECONDS)
        require(not self.thread.is_alive(), f"an abort did not come to its end in {SECONDS} s")


def require(fine: bool, text: str) -> None:
    """Raise unless the rule was kept."""
    if not fine:
        raise ValueError(text)


def filled(bed: Bed, value: int) -> torch.Tensor:
    """Some bytes on the device."""
    tensor = torch.empty(NBYTES, dtype=torch.uint8, device=bed.device)
    bed.accelerator.launch(lambda: tensor.fill_(value))
    return tensor


def value_of(tensor: torch.Tensor) -> int:
    """The value of bytes, all alike, once the device has done with them."""
    values = set(tensor.tolist())
    return values.pop() if len(values) == 1 else -1


def here(bed: Bed) -> Any:
    """An event on the current stream."""
    return bed.accelerator.current_stream(bed.device).record_event()


def happens(check: Callable[[], bool], seconds: float | None = None) -> bool:
    """Whether something is the case within some seconds; None is those of all rules."""
    deadline = time.monotonic() + (SECONDS if seconds is None else seconds)
    while not check():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def finish(bed: Bed) -> None:
    """Wait for what the current stream has to do."""
    require(happens(here(bed).query), "the current stream does not come to its end")


def lane_of(bed: Bed, name: str, seconds: float = 60.0, is_used: bool = True) -> Lane:
    """A new communicator; ``is_used`` has the pair connected, too."""
    backend = connect(
        bed.accelerator, bed.store(f"{bed.name}/{name}"), bed.rank, 2, bed.device, timedelta(seconds=seconds)
    )
    lane = Lane(bed, backend)
    if is_used:
        lane.exchange()
    return lane


# ---- waiting and order


def waiting_orders_the_stream(bed: Bed) -> None:
    """To wait for a message orders the current stream after it; the host goes on at once."""
    lane = lane_of(bed, "a")
    found = filled(bed, 0)
    if bed.rank == 1:
        began = time.monotonic()
        lane.post((False, found)).synchronize()
        event = here(bed)
        require(time.monotonic() - began < 1.0, "to wait blocked the host")
        require(not happens(event.query, MEANWHILE_SECONDS), "the stream went on before the message was there")
    bed.barrier()
    if bed.rank == 0:
        lane.send(5).synchronize()
    finish(bed)
    require(bed.rank == 0 or value_of(found) == 5, f"5 was sent, {value_of(found)} came")


def groups_are_done_in_order(bed: Bed) -> None:
    """Groups of a communicator are done in the order in which they were queued."""
    lane = lane_of(bed, "a")
    found = [filled(bed, 0) for _ in range(2)]
    works = [lane.post((False, one)) for one in found] if bed.rank == 1 else []
    if bed.rank == 0:
        lane.send(1).synchronize()
        finish(bed)
    if works:
        require(happens(works[0].is_completed), "the first message does not come")
        require(not happens(works[1].is_completed, MEANWHILE_SECONDS), "the second group ended without its message")
    bed.barrier()
    if bed.rank == 0:
        lane.send(2).synchronize()
    for work in works:
        work.synchronize()
    finish(bed)
    values = [value_of(one) for one in found]
    require(bed.rank == 0 or values == [1, 2], f"1 and 2 were sent, {values} came")


def messages_match_in_order(bed: Bed) -> None:
    """Messages of two ranks match in the order in which they are queued, whatever their tags."""
    lane = lane_of(bed, "a")
    found = [filled(bed, 0) for _ in range(2)]
    with bed.accelerator.on_device(bed.device):
        for index, tag in enumerate((3, 1) if bed.rank == 0 else (1, 3)):
            lane.backend._start_coalescing()
            if bed.rank == 0:
                lane.backend.send([filled(bed, index + 1)], 1, tag)
            else:
                lane.backend.recv([found[index]], 0, tag)
            lane.backend._end_coalescing().synchronize()
    finish(bed)
    values = [value_of(one) for one in found]
    require(bed.rank == 0 or values == [1, 2], f"1 and 2 were sent, {values} came")


def communicators_do_not_wait_for_each_other(bed: Bed) -> None:
    """What waits on one communicator does not hold up another one."""
    waiting, other = lane_of(bed, "a"), lane_of(bed, "b")
    found = filled(bed, 0)
    work = waiting.post((False, found)) if bed.rank == 1 else None
    other.exchange()
    require(work is None or not work.is_completed(), "a receive ended without its message")
    bed.barrier()
    work = waiting.send(4) if work is None else work
    work.synchronize()
    finish(bed)


def a_receive_holds_up_no_computation(bed: Bed) -> None:
    """What the current stream has to do goes on beside a receive that nobody waits for."""
    lane = lane_of(bed, "a")
    found = filled(bed, 0)
    work = lane.post((False, found)) if bed.rank == 1 else None
    bed.compute(0.02)
    finish(bed)
    require(work is None or not work.is_completed(), "a receive ended without its message")
    bed.barrier()
    work = lane.send(4) if work is None else work
    work.synchronize()
    finish(bed)


def communicators_in_one_order_come_to_their_end(bed: Bed) -> None:
    """Kernels of two communicators that all ranks queue in one order of streams never wait for each other."""
    lanes = [lane_of(bed, name) for name in ("a", "b")]
    found = [filled(bed, 0) for _ in range(6)]
    for index, one in enumerate(found):
        lanes[index % 2].post((True, filled(bed, index)), (False, one)).synchronize()
    finish(bed)
    values = [value_of(one) for one in found]
    require(values == list(range(6)), f"0 to 5 were sent, {values} came")


# ---- streams and queues


def high_priority_goes_first(bed: Bed) -> None:
    """A small kernel of a stream of high priority does not wait for all the kernels that were queued before."""
    small = filled(bed, 0)
    finish(bed)
    for _ in range(20):
        bed.compute(0.03)
    last = here(bed)
    stream = bed.accelerator.new_stream(bed.device)
    with bed.accelerator.on_stream(stream):
        bed.accelerator.launch(lambda: small.fill_(1))
        first = here(bed)
    require(happens(first.query), "a small kernel does not come to its end")
    require(not last.query(), "a kernel of high priority waited for all those before it")
    finish(bed)


def streams_have_queues_of_their_own(bed: Bed) -> None:
    """With 32 hardware queues a stream does not wait for what another one, which waits, has queued before."""
    require(not _is_held_up(bed), "a stream waited for another one, with which it has nothing to do")


def one_queue_holds_up_all(bed: Bed) -> None:
    """With one hardware queue a stream waits for what another one has queued before, though that waits itself."""
    if not _is_held_up(bed):
        raise Laxer("one hardware queue did not hold up a stream behind another one that waits")


def _is_held_up(bed: Bed) -> bool:
    """A stream computes and has something to do after that; then another one has something to do."""
    finish(bed)
    first, second = (bed.accelerator.new_stream(bed.device) for _ in range(2))
    with bed.accelerator.on_stream(first):
        bed.compute(1.0)
        first.wait_event(here(bed))
        end = here(bed)
    with bed.accelerator.on_stream(second):
        event = here(bed)
    held_up = not happens(event.query, MEANWHILE_SECONDS)
    require(not end.query(), "a computation of a second ended before its time")
    require(happens(end.query), "a stream does not come to its end")
    return held_up


# ---- failures


def to_abort_ends_what_waits_here(bed: Bed) -> None:
    """After an abort the stream that waited for a message goes on, and nothing can be queued any more."""
    lane = lane_of(bed, "a")
    if bed.rank == 1:
        lane.post((False, filled(bed, 0))).synchronize()
        event = here(bed)
        aborted = Abortion(lane)
        require(happens(event.query), "a stream still waits for a communicator that was aborted")
        aborted.join()
        try:
            lane.post((False, filled(bed, 0)))
        except RuntimeError:
            pass
        else:
            raise ValueError("a group was queued on a communicator that was aborted")
    bed.barrier()
    if bed.rank == 0:
        Abortion(lane).join()


def aborts_go_together(bed: Bed) -> None:
    """Two communicators that both wait can be aborted at once, each on a thread of its own."""
    lanes = [lane_of(bed, name) for name in ("a", "b")]
    if bed.rank == 1:
        for lane in lanes:
            lane.post((False, filled(bed, 0))).synchronize()
        event = here(bed)
        for aborted in [Abortion(lane) for lane in lanes]:
            aborted.join()
        require(happens(event.query), "a stream still waits for a communicator that was aborted")
    bed.barrier()
    if bed.rank == 0:
        for aborted in [Abortion(lane) for lane in lanes]:
            aborted.join()


def errors_surface_late(bed: Bed) -> None:
    """Who waits for a rank whose end is gone is told by nobody: neither the queueing nor the waiting raises."""
    lane = lane_of(bed, "a")
    work = lane.post((False, filled(bed, 0))) if bed.rank == 1 else None
    bed.barrier()
    if bed.rank == 0:
        Abortion(lane).join()
    bed.barrier()
    if work is not None:
        work.synchronize()
        event = here(bed)
        ended = happens(event.query, MEANWHILE_SECONDS)
        Abortion(lane).join()
        require(happens(event.query), "a stream still waits for a communicator that was aborted")
        if ended:
            raise Laxer("a receive ended by itself when the other end was aborted")


def a_group_that_failed_leaves_the_thread_usable(bed: Bed) -> None:
    """A group that is closed after an error holds up no other communicator of its thread."""
    doomed, other = lane_of(bed, "a", is_used=False), lane_of(bed, "b")
    try:
        operations = [Operation(True, 9, filled(bed, 1))]
        post_group(bed.accelerator, doomed.backend, bed.device, {9: 9}, operations)
    except RuntimeError:
        pass
    else:
        raise ValueError("a message to a rank that does not exist was queued")
    other.exchange()
    Abortion(doomed).join()


def the_first_message_of_a_pair_blocks_the_host(bed: Bed) -> None:
    """A pair connects when it is first used: the host waits for the other one, but no longer than until an abort."""
    lane = lane_of(bed, "a", is_used=False)
    blocked = False
    if bed.rank == 1:
        tensor, raised = filled(bed, 0), []

        def post() -> None:
            try:
                lane.post((False, tensor))
            except RuntimeError as error:
                raised.append(error)

        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        thread.join(MEANWHILE_SECONDS)
        blocked = thread.is_alive()
        aborted = Abortion(lane)
        thread.join(SECONDS)
        require(not thread.is_alive(), "an abort did not free a host that connects")
        aborted.join()
    bed.barrier()
    if bed.rank == 0:
        Abortion(lane).join()
    elif not blocked:
        raise Laxer("the first message of a pair did not block the host")


def nothing_watches_by_itself(bed: Bed) -> None:
    """A message may be late, by more than the timeout of the backend: torch ends neither it nor the process."""
    lane = lane_of(bed, "a", seconds=1.0)
    found = filled(bed, 0)
    work = lane.post((False, found)) if bed.rank == 1 else None
    time.sleep(2.5)
    require(work is None or not work.is_completed(), "a receive ended without its message")
    bed.barrier()
    if work is None:
        work = lane.send(6)
    work.synchronize()
    finish(bed)
    require(bed.rank == 0 or value_of(found) == 6, f"6 was sent, {value_of(found)} came")


RULES: Sequence[Callable[[Bed], None]] = (
    waiting_orders_the_stream,
    groups_are_done_in_order,
    messages_match_in_order,
    communicators_do_not_wait_for_each_other,
    a_receive_holds_up_no_computation,
    communicators_in_one_order_come_to_their_end,
    high_priority_goes_first,
    streams_have_queues_of_their_own,
    to_abort_ends_what_waits_here,
    aborts_go_together,
    errors_surface_late,
    a_group_that_failed_leaves_the_thread_usable,
    the_first_message_of_a_pair_blocks_the_host,
    nothing_watches_by_itself,
)
ONE_QUEUE_RULES: Sequence[Callable[[Bed], None]] = (one_queue_holds_up_all,)
"""Of ranks that have one hardware queue, CUDA_DEVICE_MAX_CONNECTIONS=1."""
