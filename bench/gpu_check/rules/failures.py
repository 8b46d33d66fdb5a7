"""Rules of failures, of connecting, and of kernels that are loaded."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from bench.gpu_check.rules.bed import (
    MEANWHILE_SECONDS,
    SECONDS,
    Abortion,
    Bed,
    Communicator,
    Laxer,
    communicator_of,
    filled,
    finish,
    happens,
    here,
    require,
    value_of,
)
from tricomm.transport.accelerator import DeviceWork
from tricomm.transport.base import Operation
from tricomm.transport.nccl import post_group


def to_abort_ends_what_waits_here(bed: Bed) -> None:
    """After an abort the stream that waited for a message goes on, and nothing can be queued any more."""
    communicator = communicator_of(bed, "a")
    if bed.rank == 1:
        communicator.post((False, filled(bed, 0))).synchronize()
        event = here(bed)
        aborted = Abortion(communicator)
        require(happens(event.query), "a stream still waits for a communicator that was aborted")
        aborted.join()
        try:
            communicator.post((False, filled(bed, 0)))
        except RuntimeError:
            pass
        else:
            raise ValueError("a group was queued on a communicator that was aborted")
    bed.barrier()
    if bed.rank == 0:
        Abortion(communicator).join()


def aborts_go_together(bed: Bed) -> None:
    """Two communicators that both wait can be aborted at once, each on a thread of its own."""
    communicators = [communicator_of(bed, name) for name in ("a", "b")]
    abort_what_waits(bed, communicators, lambda one: one.post((False, filled(bed, 0))))


def abort_what_waits(
    bed: Bed, communicators: Sequence[Communicator], post: Callable[[Communicator], DeviceWork]
) -> None:
    """Abort communicators at once while rank 1 waits on each: its stream goes on.

    Args:
        bed: of the rank.
        communicators: of both ranks.
        post: queues on one what the stream of rank 1 is to wait for.
    """
    if bed.rank == 1:
        for communicator in communicators:
            post(communicator).synchronize()
        event = here(bed)
        for aborted in [Abortion(communicator) for communicator in communicators]:
            aborted.join()
        require(happens(event.query), "a stream still waits for a communicator that was aborted")
    bed.barrier()
    if bed.rank == 0:
        for aborted in [Abortion(communicator) for communicator in communicators]:
            aborted.join()


def errors_surface_late(bed: Bed) -> None:
    """Who waits for a rank whose end is gone is told by nobody: neither the queueing nor the waiting raises."""
    communicator = communicator_of(bed, "a")
    work = communicator.post((False, filled(bed, 0))) if bed.rank == 1 else None
    bed.barrier()
    if bed.rank == 0:
        Abortion(communicator).join()
    bed.barrier()
    if work is not None:
        work.synchronize()
        event = here(bed)
        ended = happens(event.query, MEANWHILE_SECONDS)
        Abortion(communicator).join()
        require(happens(event.query), "a stream still waits for a communicator that was aborted")
        if ended:
            raise Laxer("a receive ended by itself when the other end was aborted")


def a_group_that_failed_leaves_the_thread_usable(bed: Bed) -> None:
    """A group that is closed after an error holds up no other communicator of its thread."""
    doomed, other = communicator_of(bed, "a", is_used=False), communicator_of(bed, "b")
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
    communicator = communicator_of(bed, "a", is_used=False)
    blocks_until_aborted(
        bed, communicator, lambda tensor: communicator.post((False, tensor)), "the first message of a pair"
    )


def blocks_until_aborted(
    bed: Bed, communicator: Communicator, post: Callable[[torch.Tensor], object], what: str
) -> None:
    """Whether what only rank 1 posts, and rank 0 does not, blocks the host until an abort.

    Args:
        bed: of the rank.
        communicator: that is aborted.
        post: what is posted.
        what: that is, in words.
    """
    blocked = False
    if bed.rank == 1:
        tensor = filled(bed, 0)

        def try_it() -> None:
            with suppress(RuntimeError):
                post(tensor)

        thread = threading.Thread(target=try_it, daemon=True)
        thread.start()
        thread.join(MEANWHILE_SECONDS)
        blocked = thread.is_alive()
        aborted = Abortion(communicator)
        thread.join(SECONDS)
        require(not thread.is_alive(), "an abort did not free a host that connects")
        aborted.join()
    bed.barrier()
    if bed.rank == 0:
        Abortion(communicator).join()
    elif not blocked:
        raise Laxer(f"{what} did not block the host")


def a_new_kernel_waits_for_those_that_run(bed: Bed) -> None:
    """To load a kernel waits on the host for all that run on the device, for a receive until its message comes."""
    communicator = communicator_of(bed, "a")
    found = filled(bed, 0)
    work = communicator.post((False, found)) if bed.rank == 1 else None
    thread = threading.Thread(target=bed.compute_anew, daemon=True)
    thread.start()
    thread.join(MEANWHILE_SECONDS if bed.rank == 1 else SECONDS)
    blocked = thread.is_alive()
    bed.barrier()
    if work is None:
        require(not blocked, "a kernel could not be loaded where nothing runs")
        work = communicator.send(4)
    thread.join(SECONDS)
    require(not thread.is_alive(), "a kernel could not be loaded when the message was there")
    work.synchronize()
    finish(bed)
    if bed.rank == 1 and not blocked:
        raise Laxer("a kernel was loaded beside a receive that waits")


def to_abort_frees_a_host_that_loads_a_kernel(bed: Bed) -> None:
    """While a kernel is loaded the driver answers nobody, but an abort ends what it waits for."""
    communicator = communicator_of(bed, "a")
    if bed.rank == 1:
        communicator.post((False, filled(bed, 0)))
        thread = threading.Thread(target=bed.compute_anew, daemon=True)
        thread.start()
        thread.join(MEANWHILE_SECONDS)
        aborted = Abortion(communicator)
        thread.join(SECONDS)
        require(not thread.is_alive(), "an abort did not free a host that loads a kernel")
        aborted.join()
        finish(bed)
    bed.barrier()
    if bed.rank == 0:
        Abortion(communicator).join()


def nothing_watches_by_itself(bed: Bed) -> None:
    """A message may be late, by more than the timeout of the backend: torch ends neither it nor the process."""
    communicator = communicator_of(bed, "a", seconds=1.0)
    found = filled(bed, 0)
    work = communicator.post((False, found)) if bed.rank == 1 else None
    time.sleep(2.5)
    require(work is None or not work.is_completed(), "a receive ended without its message")
    bed.barrier()
    if work is None:
        work = communicator.send(6)
    work.synchronize()
    finish(bed)
    require(bed.rank == 0 or value_of(found) == 6, f"6 was sent, {value_of(found)} came")
