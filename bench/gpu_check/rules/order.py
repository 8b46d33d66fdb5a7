"""Rules of waiting and order, of streams and of hardware queues."""

import time

from bench.gpu_check.rules.bed import (
    MEANWHILE_SECONDS,
    Bed,
    Laxer,
    communicator_of,
    filled,
    finish,
    happens,
    here,
    require,
    value_of,
)


def waiting_orders_the_stream(bed: Bed) -> None:
    """To wait for a message orders the current stream after it; the host goes on at once."""
    communicator = communicator_of(bed, "a")
    found = filled(bed, 0)
    if bed.rank == 1:
        began = time.monotonic()
        communicator.post((False, found)).synchronize()
        event = here(bed)
        require(time.monotonic() - began < 1.0, "to wait blocked the host")
        require(not happens(event.query, MEANWHILE_SECONDS), "the stream went on before the message was there")
    bed.barrier()
    if bed.rank == 0:
        communicator.send(5).synchronize()
    finish(bed)
    require(bed.rank == 0 or value_of(found) == 5, f"5 was sent, {value_of(found)} came")


def groups_are_done_in_order(bed: Bed) -> None:
    """Groups of a communicator are done in the order in which they were queued."""
    communicator = communicator_of(bed, "a")
    found = [filled(bed, 0) for _ in range(2)]
    works = [communicator.post((False, one)) for one in found] if bed.rank == 1 else []
    if bed.rank == 0:
        communicator.send(1).synchronize()
        finish(bed)
    if works:
        require(happens(works[0].is_completed), "the first message does not come")
        require(not happens(works[1].is_completed, MEANWHILE_SECONDS), "the second group ended without its message")
    bed.barrier()
    if bed.rank == 0:
        communicator.send(2).synchronize()
    for work in works:
        work.synchronize()
    finish(bed)
    values = [value_of(one) for one in found]
    require(bed.rank == 0 or values == [1, 2], f"1 and 2 were sent, {values} came")


def messages_match_in_order(bed: Bed) -> None:
    """Messages of two ranks match in the order in which they are queued, whatever their tags."""
    communicator = communicator_of(bed, "a")
    found = [filled(bed, 0) for _ in range(2)]
    with bed.accelerator.on_device(bed.device):
        for index, tag in enumerate((3, 1) if bed.rank == 0 else (1, 3)):
            communicator.backend._start_coalescing()
            if bed.rank == 0:
                communicator.backend.send([filled(bed, index + 1)], 1, tag)
            else:
                communicator.backend.recv([found[index]], 0, tag)
            communicator.backend._end_coalescing().synchronize()
    finish(bed)
    values = [value_of(one) for one in found]
    require(bed.rank == 0 or values == [1, 2], f"1 and 2 were sent, {values} came")


def communicators_do_not_wait_for_each_other(bed: Bed) -> None:
    """What waits on one communicator does not hold up another one."""
    waiting, other = communicator_of(bed, "a"), communicator_of(bed, "b")
    work = waiting.wait_on_rank_1()
    other.exchange()
    waiting.release(work)


def a_receive_holds_up_no_computation(bed: Bed) -> None:
    """What the current stream has to do goes on beside a receive that nobody waits for."""
    communicator = communicator_of(bed, "a")
    work = communicator.wait_on_rank_1()
    bed.compute(0.02)
    finish(bed)
    communicator.release(work)


def communicators_in_one_order_come_to_their_end(bed: Bed) -> None:
    """Kernels of two communicators that all ranks queue in one order of streams never wait for each other."""
    communicators = [communicator_of(bed, name) for name in ("a", "b")]
    found = [filled(bed, 0) for _ in range(6)]
    for index, one in enumerate(found):
        communicators[index % 2].post((True, filled(bed, index)), (False, one)).synchronize()
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
