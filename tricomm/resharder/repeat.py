"""A call with the tensors of the one before, on the same connections: nothing is looked up, bound or made for it anew.

A call that comes after something else finds its code and its data in no cache. Then each function that it enters costs
as much as ten in a loop, and a call of few bytes costs what its functions do. So this is one, and it looks at what may
have changed since the call before, alone; whatever has leaves the call to the ordinary way, which says why.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from sys import _getframe
from threading import get_ident
from time import perf_counter
from typing import Any, NamedTuple

import torch

from tricomm.errors import TransportError
from tricomm.packing.holdings import Tensors
from tricomm.transport.base import Prepare, Prepares
from tricomm.transport.channel import Channel
from tricomm.transport.communicator import Communicator
from tricomm.transport.coordination.run import Place, Run
from tricomm.transport.handle import Ended
from tricomm.transport.moving.kept import CachedBinding, Unchanged
from tricomm.transport.moving.steps import Bound, Completion
from tricomm.transport.runtime import PlanExecution
from tricomm.transport.session import Session
from tricomm.transport.streams import HostStreamContext
from tricomm.transport.tally import MOST_NOTED, Tally
from tricomm.transport.telling import name_error

_is_in_transform = torch._C._are_functorch_transforms_active
_count_modes = torch._C._len_torch_dispatch_stack
_increment_version = torch._C._increment_version

Start = tuple[Callable[[], object] | None, Callable[[int], Any], int]
"""What packs an operation, if anything does; what starts it with a tag and returns the backend's work; and the peer."""


class Prepared(NamedTuple):
    """A run that is one step, with what starts each of its operations made.

    Attributes:
        bound: the run.
        starts: in the order of the works.
        completions: see Step.
    """

    bound: Bound
    starts: tuple[Start, ...]
    completions: tuple[Completion, ...]

    @classmethod
    def of(cls, bound: Bound, prepare: Prepare | None, is_confirmed: bool) -> "Prepared | None":
        """Prepare a run; None if it takes several steps, or operations are not started each by itself."""
        if prepare is None or len(bound.steps) > 1:
            return None
        ((_, receives, sends, rounds),) = bound.steps
        starts: list[Start] = []
        for operation, pack in (*((one, None) for one in receives), *sends):
            start = prepare(operation, is_confirmed)
            if start is None:
                return None
            starts.append((pack, start, operation.peer))
        return cls(bound, tuple(starts), tuple(one for _, of_round in rounds for one in of_round))

    def move(self, run: Run, limit: timedelta, tally: Tally) -> None:
        """Move all in a run that has begun, as ``runtime.run_move`` does.

        Raises:
            RuntimeError: of the connection with the peer that ``run.waiting_for`` names.
        """
        tag, works = run.tag, list[tuple[int, Any]]()
        packing, posting = 0.0, perf_counter()
        for pack, start, peer in self.starts:
            if pack is not None:
                now = perf_counter()
                pack()
                packing += perf_counter() - now
            run.waiting_for = peer
            works.append((peer, start(tag)))
            run.waiting_for = None
        unpacking, posted = 0.0, perf_counter()
        for awaited, unpack in self.completions:
            if awaited is not None:
                run.waiting_for, work = works[awaited]
                if work is not None:
                    work.wait(limit)
                run.waiting_for = None
            if unpack is not None:
                now = perf_counter()
                unpack()
                unpacking += perf_counter() - now
        waited = perf_counter() - posted - unpacking
        tally.noted.append((self.bound, packing, posted - posting - packing, unpacking, waited))
        if len(tally.noted) >= MOST_NOTED:
            tally.settled()


class Repeat:
    """See above.

    Args:
        session: of the Resharder.
        execution: of its plan.
        binding: of the call before.
        sources, destinations: what that was given: at most one each.
        name: of the Resharder, and what it is about; see name_error.

    Attributes:
        communicator: of the call before.
    """

    __slots__ = (
        "_binding",
        "_channel",
        "_destination",
        "_execution",
        "_fields",
        "_intent",
        "_label",
        "_limit",
        "_name",
        "_near",
        "_prepared",
        "_process",
        "_session",
        "_source",
        "_tally",
        "communicator",
    )

    def __init__(
        self,
        session: Session,
        execution: PlanExecution,
        binding: CachedBinding,
        sources: Tensors,
        destinations: Tensors,
        name: tuple[str, str],
    ) -> None:
        references = [reference for reference, *_ in binding.tensors]
        self._source = Unchanged(sources[0], references[0]) if sources else None
        self._destination = Unchanged(destinations[0], references[-1]) if destinations else None
        self._session, self._execution, self._binding, self._name = session, execution, binding, name
        self._tally = execution.tally
        self._channel, self._fields = session.channel, session.call_fields
        self._label, self._process = session.identity.label, os.getpid()
        self._limit = Place.of("", session.timeout_seconds).limit_after(session.timeout_seconds)
        self._intent = session.intent(session.calls) if session.meets_always else None
        self._near = self._channel.near() if session.meets_always and session.uses_memory else None
        assert session.communicator is not None
        self.communicator = session.communicator
        connections = self.communicator.connections
        prepare = connections.prepare if isinstance(connections, Prepares) else None
        self._prepared = Prepared.of(binding.bound, prepare, session.confirms)

    def make(self, tensor: Any, out: Any) -> bool:
        """Make the call once more; false, and nothing is done, if it is another one.

        Raises:
            TransportError: a rank failed.
        """
        source, destination, session, channel = self._source, self._destination, self._session, self._channel
        communicator, binding, intent, turn = self.communicator, self._binding, self._intent, channel.turn
        if not (
            (tensor is None if source is None else source.is_same(tensor))
            and (out is None if destination is None else destination.is_same(out))
            and not (source is None and destination is None and _is_in_transform())
            and not (out is None and _count_modes())
            and session.communicator is communicator
            and communicator.is_usable
            and not session.is_closed
            and os.getpid() == self._process
            and (turn.holders.setdefault(0, (get_ident(), _getframe()))[1] is _getframe() or turn.take(_getframe()))
            and (channel.last_started is None or _keeps_turn(channel, channel.last_started))
        ):
            return False
        session.calls = number = session.calls + 1
        run = None
        try:
            if intent is not None:
                session.call_fields = self._fields
                communicator = session.meet_again(intent, self._near, number)
            run = communicator.begin(session.tag, number, self._label, session.timeout_seconds, session.uses_memory)
            if communicator.unread_of is not None and session.uses_memory:
                communicator.catch_up()
            is_bound = communicator is self.communicator and (
                not binding.staging_nbytes or channel.staged is binding.staging
            )
            if self._prepared is None or not is_bound:
                self._move_by_steps(communicator, tensor, out)
            else:
                self._prepared.move(run, self._limit, self._tally)
            if session.confirms:
                communicator.confirm()
            communicator.end(run, is_complete=True)
        except BaseException as error:
            self._fail(communicator, run, error, tensor, out)
        else:
            turn.holders.clear()
        if destination is not None and destination.has_version:
            _increment_version((out,))
        return True

    def _move_by_steps(self, communicator: Communicator, tensor: Any, out: Any) -> None:
        execution, staging = self._execution, self._channel.staging
        communicator.gather(execution.groups)
        steps = execution.steps_again(self._binding, staging, communicator)
        for work in steps or execution.steps(*self._sides(tensor, out), staging, communicator):
            communicator.wait(work)

    def _sides(self, tensor: Any, out: Any) -> tuple[list[Any], list[Any]]:
        return [] if self._source is None else [tensor], [] if self._destination is None else [out]

    def _fail(
        self,
        communicator: Communicator,
        run: Run | None,
        error: BaseException,
        tensor: Any,
        out: Any,
    ) -> None:
        """Make the call anew if what failed was an earlier one, which was over here; else raise why it failed."""
        session = self._session
        try:
            if run is None:
                raise error
            try:
                peer = run.waiting_for
                if peer is not None and isinstance(error, RuntimeError) and not isinstance(error, TransportError):
                    cause, error = error, communicator.failed(peer, error)
                    error.__cause__ = cause
                session.end_badly(communicator, run, error)
            except TransportError as failure:
                deadline = run.began + session.timeout_seconds
                session.call_fields, sides = self._fields, self._sides(tensor, out)
                session.carry_out_anew(failure, communicator, self._execution, *sides, session.calls, deadline, None)
        except BaseException as failure:
            session.__exit__(type(failure), failure, None)
            name_error(failure, *self._name)
            raise
        session.__exit__(None, None, None)


def _keeps_turn(channel: Channel, last: "Future[Ended]") -> bool:
    """Whether nothing has to wait behind what was started last; else the turn is given back."""
    if last.done() and last.exception() is None:
        return True
    channel.turn.give_back()
    return False


def remember(
    session: Session, execution: PlanExecution, sources: Tensors, destinations: Tensors, name: tuple[str, str]
) -> None:
    """Say what a call was like that is over: if it was as the one before, others may be, too. See Repeat."""
    kept = execution.kept
    binding = kept.bindings.get(0)
    if kept.repeat is not None and kept.repeat.communicator is not session.communicator:
        kept.repeat = None
    # On a device a call returns before it is over, which the next one has to look at.
    is_over = isinstance(session.channel.stream_context, HostStreamContext)
    if kept.repeat is None and binding is not None and kept.is_bound_again and is_over:
        kept.repeat = Repeat(session, execution, binding, sources, destinations, name)
