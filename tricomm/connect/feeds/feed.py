"""Feed: versions of tensors that one side of a World pushes to another."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Unpack

import torch

from tricomm.connect.feeds.ballot import GO, REFUSE, Ballot, Offer, look_until
from tricomm.connect.feeds.movers import Movers, options_between
from tricomm.connect.feeds.push import FENCE, SNAPSHOT, Latest, Push, Snapshot, Telling, check_version, failure_of
from tricomm.connect.world import World
from tricomm.errors import ArgumentError, SpecError, TransportError
from tricomm.kinds import checks_kinds
from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options, ReshardOptions
from tricomm.transport.channel import Worker
from tricomm.transport.coordination.store import store_errors
from tricomm.transport.group import context_of


class Feed:
    """Versions of tensors that one side of a World pushes to another, each published when all ranks have it whole.

    Every rank of both sides makes it, for one epoch. The source calls ``push``, which never waits for a destination
    that is not ready; the destination says ``ready`` and, when a push is ``offered``, calls ``pull``. From the first
    byte on the destination's tensors are dirty; when every rank of both sides has done its part, the version is
    published, for all at once. If anything fails before, it is published nowhere, the tensors stay dirty and ``latest``
    says so.

    Args:
        world: the group.
        specs: what ``world.exchange`` gave: the tensors of both sides, of the same names, or related by rules.
        source, destination: the sides.
        before: the feed of the epoch before, on ranks that had one, so that what they hold is known.
        options: of the moves: those of :class:`tricomm.Options`. ``timeout_seconds`` is for each move, and then for the
            votes; ``name`` tells feeds of one world apart; ``rules`` default to those that a side told in the exchange,
            and are the same on all ranks, which is compared.

    Raises:
        SpecError: names that one side has and the other has not, rules that do not fit them, or layouts that
            contradict each other.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from tricomm import Mesh, Shard
        >>> from tricomm.connect.meeting.server import Meeting
        >>> from tricomm.connect.world import connect
        >>> secret = "a secret of one example"
        >>> meeting = Meeting("tcp://127.0.0.1:0", secret=secret)
        >>> def run(side):  # each in a job of its own
        ...     sizes = {"trainer": 1, "server": 1}
        ...     world = connect(meeting.address, side=side, side_rank=0, side_sizes=sizes, secret=secret, device="cpu")
        ...     specs = world.exchange({"w": ShardingSpec(Mesh([0], ("x",)), (Shard(0),), (4,), "float32")})
        ...     feed = Feed(world, specs, source="trainer", destination="server")
        ...     if side == "trainer":
        ...         return feed.push({"w": torch.ones(4)}, version=1, wait_seconds=30).wait()
        ...     return feed.pull({"w": torch.empty(4)}), feed.latest()
        >>> with ThreadPoolExecutor() as jobs:
        ...     list(jobs.map(run, ["trainer", "server"]))
        [True, (Offer(version=1, base_version=None), Latest(version=1, dirty=''))]
        >>> meeting.close()
    """

    @checks_kinds
    def __init__(
        self,
        world: World,
        specs: Mapping[str, Mapping[str, ShardingSpec]],
        *,
        source: str,
        destination: str,
        before: "Feed | None" = None,
        **options: Unpack[ReshardOptions],
    ) -> None:
        sources, destinations = world.ranks_of(source), world.ranks_of(destination)
        if source == destination:
            raise SpecError(f"source and destination are both {source!r}; within one side, use a Resharder")
        chosen = options_between(specs, source, destination, Options.of({**options, "group": world}, "Feed"))
        self.world = world
        self.dirty: str = before.dirty if before is not None else ""
        """On the destination: why its tensors are a mix; "" if they are the version that it holds."""
        self.held: int | None = before.held if before is not None else None
        """On the destination: the version that this rank's tensors are; None is none, or a mix."""
        self._seconds = chosen.seconds
        self._sources = sources
        self._is_source = world.side == source
        self._is_destination = world.side == destination
        self._movers = Movers(specs[source], specs[destination], chosen)
        self._ballot = Ballot(world.get_group_store(), f"feed {chosen.name}", world.rank(), sources, destinations)
        self._number = 0
        self._ready = 0
        self._attempts = 0
        self._last_version: int | None = None
        self._snapshot = Snapshot()
        self._worker = Worker()
        if self._is_destination:
            with store_errors():
                self._ballot.say_held(world.side_rank, self.held, self.dirty)

    # ---- the source

    @checks_kinds
    def push(
        self,
        tensors: Mapping[str, torch.Tensor | None],
        version: int,
        *,
        base_version: int | None = None,
        beside: str = FENCE,
        wait_seconds: float = 0.0,
    ) -> Push:
        """Push a version, in the background, if all ranks of the destination are ready; else skip it.

        Every rank of the source calls it as often as the others; rank 0 decides for all.

        ::

            push = feed.push(model.state_dict(), version=step)  # returns at once
            if push.is_started:
                push.wait_source()  # the optimizer may write again
                optimizer.step()

        Args:
            tensors: this rank's shards by name; None where it is not on the mesh.
            version: higher than any before in this epoch.
            base_version: that every rank of the destination must hold; None is any.
            beside: "fence": the tensors must not change before ``Push.wait_source`` returns; "snapshot": they may at
                once, as they are copied first, which takes as much memory again.
            wait_seconds: how long to wait for the destination to be ready before it is skipped.

        Raises:
            SpecError: tensors that do not fit, or a version that is not higher. The push fails everywhere, if it began.
            TransportError: the epoch is over, the destination does not hold the base version, or the source's ranks
                push different versions.
        """
        self._check_side(self._is_source, "push", "source")
        check_version(version, base_version, beside, wait_seconds)
        if self._last_version is not None and version <= self._last_version:
            raise SpecError(f"version={version} must be higher than {self._last_version}, the last one; count steps")
        self._attempts += 1
        number = self._number + 1
        with store_errors():
            if self.world.side_rank == 0:
                decision = self._ballot.decide(number, self._attempts, Offer(version, base_version), wait_seconds)
            else:
                decision = self._ballot.decided(self._attempts, wait_seconds + self._seconds)
        if decision.what == REFUSE:
            raise TransportError(decision.why)
        if decision.what != GO:
            return Push(version, decision.why)
        self._number = number
        self._last_version = version
        problem = None
        if decision.version != version:
            # It began, and the others are in their moves: go through them, and vote against it.
            problem = (
                f"rank {self.world.rank()} pushes version {version}, and rank 0 of its side version "
                f"{decision.version}; all ranks of a side push the same"
            )
        return self._started(number, tensors, version, beside, problem)

    def _started(
        self,
        number: int,
        tensors: Mapping[str, torch.Tensor | None],
        version: int,
        beside: str,
        problem: str | None,
    ) -> Push:
        nbytes = 0
        tensors = {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
        with self._telling(number, version):
            if beside == SNAPSHOT:
                tensors = self._snapshot.of(tensors)
                nbytes = self._snapshot.nbytes
            handles = self._movers.start(tensors, {})
        outcome = self._worker.submit(lambda: self._settle(number, version, problem or failure_of(handles)))
        return Push(version, "", handles, outcome, nbytes)

    # ---- the destination

    def ready(self) -> None:
        """Say that this rank takes the next push whenever it starts: it will be in ``pull`` soon after.

        ``pull`` says so too. A destination of which one rank has not said so is skipped.

        ::

            feed.ready()
            while feed.offered() is None:
                serve_one_batch()
            feed.pull(model.state_dict())
        """
        self._check_side(self._is_destination, "ready", "destination")
        if self._ready == self._number:
            self._ready += 1
            with store_errors():
                self._ballot.say_held(self.world.side_rank, self.held, self.dirty)
                self._ballot.say_ready(self._ready)

    def offered(self) -> Offer | None:
        """Return the push that has started and waits for this rank's ``pull``; None if there is none. Does not wait.

        ::

            if feed.offered() is not None:  # between two batches
                feed.pull(model.state_dict())

        Raises:
            TransportError: the epoch is over, or the source has left.
        """
        self._check_side(self._is_destination, "offered", "destination")
        with store_errors():
            found = self._ballot.offer(self._number + 1)
        gone = next((text for rank, text in context_of(self.world).dead.items() if rank in self._sources), None)
        if found is None and gone is not None:
            raise TransportError(f"{gone}; there will be no push")
        return found

    @checks_kinds
    def pull(
        self, out: Mapping[str, torch.Tensor | None], timeout_seconds: float | timedelta | None = None
    ) -> Offer | None:
        """Take the next push into tensors in place, and return what it brought when it is published.

        Every rank of the destination calls it. Until it returns, the tensors are a mix of versions.

        ::

            offer = feed.pull(model.state_dict(), timeout_seconds=5)
            if offer is not None:
                print(f"serving version {offer.version}")

        Args:
            out: this rank's tensors by name.
            timeout_seconds: how long to wait for a push to start; None is the feed's. One that has started is waited
                for as long as the moves take.

        Returns:
            The version; None if no push has started in that time. The rank stays ready.

        Raises:
            SpecError: tensors that do not fit. The push fails everywhere.
            TransportError: the push failed. The tensors stay dirty, and ``dirty`` and ``latest`` say why.
        """
        self.ready()
        seconds = self._seconds if timeout_seconds is None else Options(timeout_seconds=timeout_seconds).seconds
        offer = look_until(self.offered, time.monotonic() + seconds)
        if offer is None:
            return None
        self._number += 1
        self.held, self.dirty = None, f"the push of version {offer.version} is under way"
        number = self._number
        out = {name: None if tensor is None else tensor.detach() for name, tensor in out.items()}
        with self._telling(number, offer.version):
            handles = self._movers.start({}, out)
        failure = self._settle(number, offer.version, failure_of(handles))
        if failure:
            raise TransportError(f"{self.dirty}; the tensors are a mix until another push is published")
        self.held, self.dirty = offer.version, ""
        return offer

    # ---- both

    def latest(self) -> Latest:
        """Return what the destination holds, as all ranks of both sides may ask.

        ::

            version, dirty = feed.latest()
            print(f"version {version}" if not dirty else f"not usable: {dirty}")

        Raises:
            TransportError: the epoch is over.
        """
        with store_errors():
            ballot, number = self._ballot, self._ballot.started()
            if number == 0:
                held = ballot.held()
                dirty = next((text for _, text in held if text), "")
                versions = {version for version, _ in held}
                return Latest(next(iter(versions)) if len(versions) == 1 else None, dirty)
            outcome, offer = ballot.outcome(number), ballot.offer(number)
            assert offer is not None
            if outcome == "":
                return Latest(offer.version, "")
            state = "is under way" if outcome is None else f"failed: {outcome}"
            return Latest(ballot.latest(), f"the push of version {offer.version} {state}")

    @checks_kinds
    def wait_newer(self, than: int | None, timeout_seconds: float | timedelta | None = None) -> int:
        """Return the version that was published last, when that is newer than another.

        ::

            version = feed.wait_newer(than=version, timeout_seconds=60)

        Raises:
            TransportError: none came in time, or the epoch is over.
        """
        seconds = self._seconds if timeout_seconds is None else Options(timeout_seconds=timeout_seconds).seconds

        def newer() -> int | None:
            with store_errors():
                found = self._ballot.latest()
            return found if found is not None and (than is None or found > than) else None

        found = look_until(newer, time.monotonic() + seconds)
        if found is None:
            raise TransportError(f"no version newer than {than} was published within {seconds:.1f} s")
        return found

    def close(self) -> None:
        """Give back what its moves hold.

        ::

            feed.close()
            world.close()
        """
        self._movers.close()

    def _settle(self, number: int, version: int, failure: str | None) -> str:
        """Vote, and return why the push failed; "" if it is published."""
        found = self._ballot.vote(number, version, failure, self._seconds)
        if found:
            self.dirty = f"the push of version {version} failed: {found}" if self._is_destination else ""
        return found

    def _telling(self, number: int, version: int) -> Telling:
        return Telling(lambda text: self._settle(number, version, text), self.world.rank())

    def _check_side(self, is_right: bool, what: str, side: str) -> None:
        if not is_right:
            raise ArgumentError(f"{what}() is called on side {self.world.side!r}; only ranks of the {side} may")


def part(feed: Feed) -> None:
    """Leave the other side in peace: close a feed and what it goes through."""
    feed.close()
    feed.world.close()
