"""What the processes of two jobs do in the tests of failures: push and pull, die at a moment, and pair anew."""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

import tricomm
from tests.oracle import pick
from tricomm import Feed, Mesh, Shard, ShardingSpec, SpecError, TransportError, World
from tricomm.connect import facts
from tricomm.connect.feeds.ballot import Ballot
from tricomm.transport.communicator import Communicator

SECRET = "a secret of the tests"
SIZES = {"trainer": 2, "server": 3}
SHAPE = (512, 513)
OWN = {
    "trainer": {"w": ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), SHAPE, "float32")},
    "server": {"w": ShardingSpec(Mesh([0, 1, 2], ("tp",)), (Shard(1),), SHAPE, "float32")},
}
PUSHES = 3
"""In each epoch, the last of which fails in the first one."""

TIMEOUT_SECONDS = 6.0


def full(version: int) -> torch.Tensor:
    return torch.arange(float(SHAPE[0] * SHAPE[1])).reshape(SHAPE) + version


def join(address: str, side: str, rank: int, is_first: bool = True, **options: Any) -> World:
    sizes: dict[str, int | None] = {name: size if is_first or name == side else None for name, size in SIZES.items()}
    given = {"side_sizes": sizes, "secret": SECRET, "timeout_seconds": 40.0, "device": "cpu", **options}
    return tricomm.connect(address, side=side, side_rank=rank, **given)


def come(address: str, side: str, rank: int, pipe: Connection, options: dict[str, Any]) -> None:
    """Join, say how that went, and stay."""
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        world = join(address, side, rank, **options)
    except TransportError as error:
        pipe.send((str(error), time.monotonic() - began))
        return
    pipe.send(("", time.monotonic() - began))
    time.sleep(60)
    world.close()


def come_with(address: str, side: str, rank: int, pipe: Connection, version: str) -> None:
    """Join as a process with another torch would."""
    real = facts.facts_of
    facts.facts_of = lambda device: tuple((what, version if what == "torch" else found) for what, found in real(device))
    come(address, side, rank, pipe, {})


def abide(address: str, side: str, rank: int, pipe: Connection, what: str) -> None:
    """Join, do something else than the others, if it is told what, or wait for a push; say how that ended."""
    torch.set_num_threads(1)
    world = join(address, side, rank)
    specs = world.exchange(OWN[side], 20.0)
    feed = Feed(world, specs, source="trainer", destination="server", timeout_seconds=TIMEOUT_SECONDS)
    shape = specs[side]["w"].local_shape(world.rank())
    tensors = {"w": torch.zeros(7) if what == "passes a wrong tensor" else torch.zeros(shape)}
    world.get_group_store().add("all are here", 1)
    while world.get_group_store().find("all are here") != str(world.size()).encode():
        time.sleep(0.01)
    began = time.monotonic()
    try:
        if what == "leaves":
            world.close()
            pipe.send(("", 0.0))
            return
        if what == "is silent":
            end(signal.SIGSTOP)
        if side == "server":
            feed.pull(tensors, 40.0)
        else:
            feed.push(tensors, 1, wait_seconds=40.0).wait()
        pipe.send(("published", time.monotonic() - began))
    except (TransportError, SpecError) as error:
        pipe.send((f"{type(error).__name__}: {error}", time.monotonic() - began))
    time.sleep(1.0)  # others may still ask


def end(number: int) -> None:
    os.kill(os.getpid(), number)


def arm(moment: str, number: int) -> None:
    """Send this process a signal at a moment inside of a push."""
    if moment == "in the move":
        post, count = Communicator.post, 0

        def counting(communicator: Communicator, operations: Any) -> Any:
            def watched() -> Iterator[Any]:
                nonlocal count
                for operation in operations:
                    count += 1
                    if count == 2:
                        end(number)
                    yield operation

            return post(communicator, watched())

        Communicator.post = counting  # type: ignore[method-assign]
    elif moment == "before its vote":
        Ballot.vote = lambda *_: end(number)  # type: ignore[assignment,method-assign,return-value]


class Worker:
    """One rank of a job.

    Args:
        moment: at which it gets the signal, in the last push of the first epoch; "" is never.
    """

    def __init__(self, address: str, side: str, rank: int, pipe: Connection, moment: str, number: int) -> None:
        self.side, self.moment, self.number, self.pipe = side, moment, number, pipe
        self.is_restarted = moment == "restarted"
        self.world = join(address, side, rank, not self.is_restarted)
        self.feed: Feed | None = None
        self.enter()

    def enter(self) -> None:
        """Begin an epoch."""
        specs = self.world.exchange(OWN[self.side], 20.0)
        self.spec = specs[self.side]["w"]
        self.feed = Feed(
            self.world, specs, source="trainer", destination="server", before=self.feed, timeout_seconds=TIMEOUT_SECONDS
        )
        self.out = {"w": torch.zeros(self.spec.local_shape(self.world.rank()))}

    def strike(self, moment: str, index: int) -> None:
        if index == PUSHES and self.world.epoch == 1 and self.moment == moment:
            end(self.number)

    def push(self, index: int) -> None:
        """One push or pull; returns when it is published."""
        feed, rank, version = self.feed, self.world.rank(), 10 * self.world.epoch + index
        assert feed is not None
        self.strike("before it comes", index)
        if index == PUSHES and self.world.epoch == 1:
            arm(self.moment, self.number)
        if self.side == "trainer":
            push = feed.push({"w": pick(full(version), self.spec, rank)}, version, wait_seconds=20.0)
            assert push.is_started, push.skipped
            self.strike("when it is started", index)
            push.wait()
        else:
            feed.ready()
            self.strike("when it is started", index)
            offer = feed.pull(self.out, 20.0)
            assert offer is not None
            assert offer.version == version
            assert torch.equal(self.out["w"], pick(full(version), self.spec, rank))
        if self.moment == "after it is published" and index == PUSHES - 1 and self.world.epoch == 1:
            end(self.number)

    def run(self) -> None:
        """Push until the second epoch is through; tell each failure, and the end."""
        index = 1
        while not (self.world.epoch == 2 and index > PUSHES):
            began = time.monotonic()
            try:
                self.push(index)
                index += 1
            except TransportError as error:
                seconds = time.monotonic() - began
                assert self.feed is not None
                self.pipe.send(("failed", str(error), seconds, self.feed.dirty))
                self.world = self.world.renew(40.0)
                index = 1
                self.enter()
        assert self.feed is not None
        self.pipe.send(("done", str(self.feed.latest()), 0.0, self.feed.dirty))
        time.sleep(1.0)  # others may still ask
        self.world.close()


def work(address: str, side: str, rank: int, pipe: Connection, moment: str, number: int = signal.SIGKILL) -> None:
    """The process of a rank."""
    torch.set_num_threads(1)
    Worker(address, side, rank, pipe, moment, number).run()
