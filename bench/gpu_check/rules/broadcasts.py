"""Rules of broadcasts, and of communicators that are given back."""

from bench.gpu_check.rules.bed import (
    MEANWHILE_SECONDS,
    Bed,
    communicator_of,
    filled,
    finish,
    happens,
    here,
    require,
    value_of,
)
from bench.gpu_check.rules.failures import abort_what_waits, blocks_until_aborted

LARGE_NBYTES = 1 << 24
"""More than fits into what NCCL keeps between two ranks."""


def broadcasts_match_in_order(bed: Bed) -> None:
    """Broadcasts of a communicator meet in the order in which they are queued, whatever messages are between them."""
    communicator = communicator_of(bed, "a")
    found = [filled(bed, bed.rank + 10 * index) for index in range(3)]
    for index, tensor in enumerate(found):
        communicator.broadcast(index % 2, tensor).synchronize()
        if index == 1:
            communicator.exchange()
    finish(bed)
    values = [value_of(one) for one in found]
    require(values == [0, 11, 20], f"0, 11 and 20 were broadcast, {values} came")


def a_broadcast_waits_for_its_sender(bed: Bed) -> None:
    """Who receives a broadcast has its stream wait, and no host, until the sender has come."""
    communicator = communicator_of(bed, "a")
    communicator.broadcast(0, filled(bed, 3)).synchronize()  # all connect
    finish(bed)
    found = filled(bed, 5 if bed.rank == 0 else 0)
    finish(bed)
    if bed.rank == 1:
        communicator.broadcast(0, found).synchronize()
        event = here(bed)
        require(not happens(event.query, MEANWHILE_SECONDS), "a broadcast ended before its sender came")
    bed.barrier()
    if bed.rank == 0:
        communicator.broadcast(0, found).synchronize()
    finish(bed)
    require(value_of(found) == 5, f"5 was broadcast, {value_of(found)} came")


def the_first_broadcast_blocks_the_host(bed: Bed) -> None:
    """Ranks connect to a ring in their first broadcast: the host waits for all, but no longer than until an abort."""
    communicator = communicator_of(bed, "a")
    blocks_until_aborted(bed, communicator, lambda tensor: communicator.broadcast(0, tensor), "the first broadcast")


def to_abort_ends_a_broadcast(bed: Bed) -> None:
    """After an abort the stream that waited for a broadcast goes on, beside another communicator that waits."""
    communicators = [communicator_of(bed, name) for name in ("a", "b")]
    for communicator in communicators:
        communicator.broadcast(0, filled(bed, 3)).synchronize()
    finish(bed)
    abort_what_waits(bed, communicators, lambda one: one.broadcast(0, filled(bed, 0)))


def communicators_on_one_stream_come_to_their_end(bed: Bed) -> None:
    """Messages of one communicator and broadcasts of another follow each other on a stream that waits for each."""
    messages, broadcasts = (communicator_of(bed, name) for name in ("a", "b"))
    order = bed.accelerator.new_stream(bed.device)
    found = [filled(bed, 10 + bed.rank) for _ in range(6)]
    for index, tensor in enumerate(found):
        order.wait_event(here(bed))
        with bed.accelerator.on_stream(order):
            work = messages.post((bed.rank == index % 2, tensor)) if index < 4 else broadcasts.broadcast(0, tensor)
            work.synchronize()
    bed.accelerator.current_stream(bed.device).wait_event(order.record_event())
    finish(bed)
    values = [value_of(one) for one in found]
    require(values == [10, 11, 10, 11, 10, 10], f"10, 11, 10, 11, 10 and 10 were sent, {values} came")


def what_was_sent_arrives_though_the_sender_has_gone(bed: Bed) -> None:
    """Who gives a communicator back when its own part is done takes nothing from those that still receive."""
    for name in ("a message", "a broadcast"):
        communicator = communicator_of(bed, name)
        found = filled(bed, 9 if bed.rank == 0 else 0, LARGE_NBYTES)
        is_message = name == "a message"
        work = communicator.post((bed.rank == 0, found)) if is_message else communicator.broadcast(0, found)
        work.synchronize()
        finish(bed)
        if bed.rank == 0:
            communicator.backend.shutdown()
        require(value_of(found) == 9, f"9 was sent, {value_of(found)} came")
        bed.barrier()
