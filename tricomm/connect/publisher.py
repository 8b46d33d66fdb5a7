"""Publisher: what a trainer pushes its weights with, to fleets that come, go and start again as they like."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from tricomm.connect.agreement import gathered
from tricomm.connect.feeds.feed import Feed, part
from tricomm.connect.feeds.push import FENCE, Push, check_version
from tricomm.connect.pairing import Paired
from tricomm.errors import PlanError, SpecError, TransportError
from tricomm.kinds import checks_kinds
from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options, ReshardOptions
from tricomm.transport.group import context_of

LOG = logging.getLogger("tricomm")
MEET_SECONDS = 15.0
"""In which a fleet of which all ranks wait is met, or is not."""

MEET, PUSH, SKIP = "meet", "push", "skip"


@dataclass(slots=True)
class _Fleet:
    """A fleet as this rank of the trainer knows it."""

    name: str
    feed: Feed | None = None
    push: Push | None = None
    told: str = ""
    """Why it was lost last, which is logged once."""

    @property
    def is_paired(self) -> bool:
        """Whether all of it are there, as far as is known here."""
        feed = self.feed
        return feed is not None and not feed.world.over and not context_of(feed.world).dead


class Publisher(Paired):
    """Push versions of this job's tensors to fleets, none of which it ever waits for.

    Every rank of the job makes one and calls it as often as the others. A fleet is met when all its ranks have come
    (see :class:`tricomm.Subscriber`), at a call of ``push``, and skipped while it is not there, starts again or is not
    ready.

    Args:
        address, secret: of the meeting.
        side: this job's.
        side_rank, side_size: this rank, and how many there are.
        fleets: the sides that it pushes to; they may come late, or never.
        specs: of the tensors, on the ranks of this job.
        timeout_seconds: for the ranks of this job to come, and for each move.
        device, host: see ``connect``.
        options: of the moves: those of :class:`tricomm.Options`. ``rules`` say how the tensors of each fleet are made
            of these; they are told, and left out where a fleet tells its own.

    Raises:
        TransportError: a rank of this job did not come in time.

    Example:
        >>> from tricomm import Mesh, Shard
        >>> from tricomm.connect.meeting.server import Meeting
        >>> secret = "a secret of one example"
        >>> specs = {"w": ShardingSpec(Mesh([0], ("x",)), (Shard(0),), (4,), "float32")}
        >>> with Meeting("tcp://127.0.0.1:0", secret=secret) as meeting, Publisher(
        ...     meeting.address, side="trainer", side_rank=0, side_size=1, fleets=["server"], specs=specs,
        ...     secret=secret, device="cpu"
        ... ) as publisher:
        ...     publisher.push({"w": torch.ones(4)}, version=1)["server"].skipped
        "side 'server' is not there: waiting for all of side 'trainer' and all of side 'server' since 0.0 s"
    """

    @checks_kinds
    def __init__(
        self,
        address: str,
        *,
        side: str,
        side_rank: int,
        side_size: int,
        fleets: Sequence[str],
        specs: Mapping[str, ShardingSpec],
        secret: str | bytes,
        host: str | None = None,
        **options: Unpack[ReshardOptions],
    ) -> None:
        if not fleets or side in fleets or len(set(fleets)) != len(fleets):
            raise SpecError(f"fleets={list(fleets)!r} must be other sides than {side!r}, each once; name one or more")
        chosen = Options.of(options, "Publisher")
        self._size = side_size
        super().__init__(gathered(address, side, side_rank, side_size, secret, host, chosen), specs)
        self._side = side
        self._fleets = [_Fleet(name) for name in fleets]

    @checks_kinds
    def push(
        self,
        tensors: Mapping[str, torch.Tensor | None],
        version: int,
        *,
        base_version: int | None = None,
        beside: str = FENCE,
        wait_seconds: float = 0.0,
    ) -> dict[str, Push]:
        """Push a version to every fleet that is there and ready; see :meth:`tricomm.Feed.push`.

        Nothing that a fleet does raises: what was skipped or lost stands in ``Push.skipped``.

        ::

            for fleet, push in publisher.push(model.state_dict(), version=step).items():
                print(fleet, push.skipped or "is on its way")

        Raises:
            SpecError: tensors that do not fit, or a version that is not higher than those before.
            TransportError: a rank of this job died, after which every call raises it and all ranks of the job make a
                new Publisher; or it made another call.
        """
        check_version(version, base_version, beside, wait_seconds)
        found = {}
        for fleet in self._fleets:
            found[fleet.name] = fleet.push = self._pushed(
                fleet, tensors, version, base_version=base_version, beside=beside, wait_seconds=wait_seconds
            )
        return found

    def wait_source(self) -> None:
        """Return when the tensors that were pushed last may change; see ``Push.wait_source``.

        ::

            publisher.push(model.state_dict(), version=step)
            publisher.wait_source()
            optimizer.step()
        """
        for fleet in self._fleets:
            if fleet.push is not None:
                fleet.push.wait_source()

    def _pushed(self, fleet: _Fleet, tensors: Mapping[str, Any], version: int, **how: Any) -> Push:
        what, _, why = self._agreement.decide(lambda: self._choice(fleet)).partition(" ")
        if what == MEET:
            try:
                self._meet(fleet)
            except TransportError as error:
                return self._lost(fleet, version, error)
        if what == SKIP or fleet.feed is None:
            return Push(version, why or f"this rank has not met side {fleet.name!r}")
        try:
            return fleet.feed.push(tensors, version, **how)
        except TransportError as error:
            return self._lost(fleet, version, error)

    def _lost(self, fleet: _Fleet, version: int, error: TransportError) -> Push:
        if str(error) != fleet.told:
            LOG.warning("%s: %s", fleet.name, error)
        fleet.told = str(error)
        if fleet.feed is not None:
            fleet.feed.world.refresh()
        return Push(version, str(error))

    def _choice(self, fleet: _Fleet) -> str:
        """As rank 0: what to do with a fleet now."""
        if fleet.is_paired:
            return PUSH
        sizes: dict[str, int | None] = {self._side: self._size, fleet.name: None}
        own = self._agreement.world
        missing = own.peek(sizes)
        if any(side == fleet.name for side, _ in missing.places):
            return f"{SKIP} side {fleet.name!r} is not there: {missing}"
        return MEET

    def _meet(self, fleet: _Fleet) -> None:
        """Meet a fleet whose ranks are all there; on any failure it is met anew later."""
        before, fleet.feed = fleet.feed, None
        if before is not None:
            part(before)
        sizes: dict[str, int | None] = {self._side: self._size, fleet.name: None}
        world = self._connect(side_sizes=sizes, timeout_seconds=MEET_SECONDS)
        try:
            fleet.feed = self._feed_between(world, self._side, fleet.name)
        except (SpecError, PlanError) as error:
            world.close()
            raise TransportError(f"side {fleet.name!r} cannot be fed: {error}") from error
        except BaseException:
            world.close()
            raise

    def close(self) -> None:
        """Leave in peace, when what was pushed is over.

        ::

            publisher.close()  # or use it as ``with Publisher(...) as publisher:``
        """
        for fleet in self._fleets:
            if fleet.push is not None:
                try:
                    fleet.push.wait()
                except TransportError as error:
                    LOG.warning("%s: %s", fleet.name, error)
            if fleet.feed is not None:
                part(fleet.feed)
        self._agreement.world.close()
