"""What the other ranks are told when one of them fails or refuses, before it has a session and in it."""

import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import wait
from typing import Any

from tricomm.errors import TricommError
from tricomm.layout.spec import ShardingSpec
from tricomm.transport.channel import Channel
from tricomm.transport.communicator import Communicator
from tricomm.transport.coordination.identity import Identity
from tricomm.transport.coordination.intent import describe_refusal
from tricomm.transport.coordination.run import CallId
from tricomm.transport.coordination.status import AbortReason
from tricomm.transport.group import GroupContext
from tricomm.transport.handle import NOT_GIVEN_UP, SourceGate


def describe_failure(rank: int, what: str, error: BaseException) -> str:
    """Say why a rank does not go on: it refused its arguments, or something failed in what it did."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, TricommError):
        return describe_refusal(rank, text)
    return f"rank {rank} failed in {what}: {text}"


def name_error(error: BaseException, name: str, about: str = "") -> None:
    """Put the name of a Resharder before the text of an error of ours, unless it, or what it is about, is in there."""
    if not (name and isinstance(error, TricommError)):
        return
    said = str(error)
    if not any(one in said or repr(one)[1:-1] in said for one in (name, about or name)):
        error.args = (f"{name}: {said}",)


def tell_all(
    context: GroupContext, error: BaseException, options: Mapping[str, Any], source: object, destination: object
) -> None:
    """Whatever stops this rank before its plan stands reaches whoever may wait for it: the ranks of the meshes, if they
    are meshes, in the call that they make, and all others of the group.
    """
    # Any may be of the wrong kind, which is what the error may be about.
    name, channel = (one if isinstance(one, str) else "" for one in (options.get("name"), options.get("channel")))
    name_error(error, name)
    text = describe_failure(context.rank, f"its call of tricomm{f' for {name}' if name else ''}", error)
    everybody = tuple(range(context.size))
    sides = [[*side.values()] if isinstance(side, Mapping) else [side] for side in (source, destination)]
    specs = [spec for side in sides for spec in side if isinstance(spec, ShardingSpec)]
    ranks = tuple(sorted({rank for mesh in {id(one.mesh): one.mesh for one in specs}.values() for rank in mesh.ranks}))
    is_known = (
        bool(ranks)
        and len(specs) == len(sides[0]) + len(sides[1])
        and context.rank in ranks
        and ranks[-1] < context.size
    )
    context.rendezvous.abort(ranks if is_known else everybody, text, channel, everybody)


LONGEST_WAIT_SECONDS = 1.0
"""For runs that are given up: a look at a rendezvous takes a tenth of it, but they may have met, and be connecting."""


class Telling:
    """The part of a Session that tells the other ranks of what ends their calls, each of them once.

    They hear of it in the call that they are in, or at the rendezvous of their next one. Where a run of this rank is on
    its way to a rendezvous on another thread, that thread tells them, there: the next rendezvous is of a later call.
    """

    _channel: Channel | None
    _channel_name: str
    _context: GroupContext
    _participants: tuple[int, ...]
    _stays_broken: bool
    _met_in_call: int
    _closed: weakref.ref[Communicator] | None
    identity: Identity
    meets_always: bool
    calls: int
    tag: int
    communicator: Communicator | None
    is_closed: bool
    started: deque[SourceGate]
    """Of the runs in the background that have not ended, in their order."""
    _is_told = False
    """Whether the ranks have met for no call since one failed here, of which they know."""

    @property
    def is_connected(self) -> bool:
        """Whether a call may begin as it is."""
        return not self.is_closed and self.communicator is not None and self.communicator.is_usable

    @property
    def _given_up(self) -> tuple[str, int | None]:
        """See SourceGate: of the run that this thread is in."""
        is_in_run = self.started and self._channel is not None and self._channel.worker.is_this_thread
        return self.started[0].given_up if is_in_run else NOT_GIVEN_UP

    def give_up(self, text: str, lost: int | None = None) -> bool:
        """Let runs that have yet to meet end on the thread that they are on, as others may wait for them; if any do.

        What they leave, such as the number of what has met nobody, is there when this returns.
        """
        channel, communicator = self._channel, self.communicator
        is_met = self.meets_always or (communicator is not None and communicator.is_usable)
        if is_met or self.is_closed or channel is None or channel.worker.is_this_thread:
            return False
        started = list(self.started)
        for gate in started:
            gate.given_up = text, lost
        if started and channel.last_started is not None:
            wait([channel.last_started], LONGEST_WAIT_SECONDS)
        return bool(started)

    def _uncount(self) -> None:
        """Nobody has met this one, so that it counts anew: a rank that failed to make it will make another."""
        if self.tag:
            return
        if not self.meets_always:
            self.calls = 0
        self.identity.uncount()

    def _pass_by(self, reason: AbortReason | None) -> None:
        """This rank has heard why its connections were closed; if others hear that at a rendezvous, it is past that."""
        if reason is not None:
            self._context.rendezvous.pass_by(self._participants, self._channel_name, reason.tag - 1)

    def tell(self, error: BaseException) -> None:
        """Tell the others that this rank does not go on with its call, and why."""
        if not self.is_closed:
            self.identity.count()
        call = CallId(self.tag, self.calls, self.identity.label)
        lost = self._context.rank if self.is_closed else None
        self.abort(describe_failure(self._context.rank, str(call), error), call, lost)

    def abort(self, text: str, call: CallId | None = None, lost: int | None = None) -> None:
        """Tell the others something that ends their call; see Communicator.abort."""
        rendezvous, channel = self._context.rendezvous, self._channel_name
        is_left = self.give_up(text, lost)  # before this looks to what that thread may just have connected
        communicator = self.communicator
        if self.is_closed:
            communicator = None if self._closed is None else self._closed()
            if communicator is None and self._closed is not None:
                # Its connections have closed, which tells those that use them; others may wait at a rendezvous.
                rendezvous.abort_awaited(self._participants, text, channel)
                return
        if call is None:
            # Not in a call of this session: what others have to hear of is their next one.
            call = CallId(self.tag, self.calls + 1, self.identity.label)
        has_met = not self.meets_always or self._met_in_call == self.calls
        if communicator is not None and communicator.abort_reason is None and has_met:
            communicator.abort(text, call, lost)
            self._pass_by(communicator.abort_reason)
        elif not is_left and (not self._stays_broken or communicator is None):
            self._is_told = True
            self._uncount()
            rendezvous.abort(self._participants, text, channel)

    def leave(self, text: str) -> None:
        """Tell the others that this rank does not come to its Resharder again, unless they know that a call failed."""
        knows = self._is_told and not self.started if self.communicator is None else not self.is_connected
        if self.is_closed or not knows:
            self.abort(text, lost=self._context.rank)
