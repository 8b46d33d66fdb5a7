"""Session: one rank's calls of one Resharder, and what the other ranks are told when one of them fails here.

    NEW --the ranks have met--> CONNECTED --aborted, by whomever--> BROKEN --the ranks have met again--> CONNECTED
    any --close--> CLOSED

A call is made in the state CONNECTED; in NEW and BROKEN the ranks meet first. Whatever stops a rank in a call, from the
check of the arguments on, reaches the others at once: in the rendezvous if they are to meet there, else by closing the
connections.
"""

import sys
import time
import weakref
from collections import deque
from collections.abc import Collection, Mapping
from enum import Enum
from functools import partial
from types import TracebackType
from typing import NoReturn

from tricomm.errors import SpecError, TransportError
from tricomm.packing.holdings import Tensors
from tricomm.transport.base import Near
from tricomm.transport.channel import Channel, tag_of
from tricomm.transport.communicator import Communicator
from tricomm.transport.coordination.identity import Identity
from tricomm.transport.coordination.intent import Intent, ProblemError, describe_late
from tricomm.transport.coordination.run import CallId, Run
from tricomm.transport.group import GroupContext
from tricomm.transport.handle import SourceGate
from tricomm.transport.memory.rungs import PairTransports, describe_lacking
from tricomm.transport.runtime import PlanExecution
from tricomm.transport.telling import Telling, describe_failure

MIN_RETRY_SECONDS = 0.05
"""With less of the timeout left a call is not made again."""

CLOSED_TEXT = "a call of a Resharder that was closed; make another, or close it later"


class State(Enum):
    """Where a Session is; see above."""

    NEW = "new"
    CONNECTED = "connected"
    BROKEN = "broken"
    CLOSED = "closed"


class Session(Telling):
    """See above.

    Args:
        context: of the process group.
        channel: of the ranks.
        identity: of the Resharder.
        meets_always: whether the ranks meet in every call.
        stays_broken: whether a session that broke cannot be used again.
        timeout_seconds: for each call.
        confirm: whether a call ends only when all ranks have what they need.
        transport: "network", or what else may be used beside it.
        pairs: of ranks between which this rank sends or receives.
    """

    def __init__(
        self,
        context: GroupContext,
        channel: Channel,
        identity: Identity,
        *,
        meets_always: bool,
        stays_broken: bool,
        timeout_seconds: float,
        confirm: bool,
        transport: str = "network",
        pairs: Collection[tuple[int, int]] = (),
    ) -> None:
        self._channel: Channel | None = channel
        self._channel_name = channel.name
        self.identity = identity
        self.meets_always = meets_always
        self.call_fields: Mapping[str, str] = {}
        """What the ranks compare of a single call, where they meet for it."""
        self.calls = 0
        """Calls that were begun here, those that failed included; equal on all ranks that make the same calls."""
        self._context = context
        self._participants = channel.participants
        self._stays_broken = stays_broken
        self.timeout_seconds = timeout_seconds
        self.confirms = confirm
        self.uses_memory = transport != "network"
        self._needs_memory = pairs if transport == "memory" else ()
        self.tag = 0
        """Of its messages since they have met last."""
        self.communicator: Communicator | None = None
        """What it used last."""
        self._met_in_call = 0
        self._closed: weakref.ref[Communicator] | None = None
        self.is_closed = False
        self.last_run: Run | None = None
        """Of the last call that returned, which a device may still have to carry out."""
        self._told: BaseException | None = None
        """An error that the others know of already."""
        self.started: deque[SourceGate] = deque()

    @property
    def channel(self) -> Channel:
        """What it shares with others; not once it is closed."""
        assert self._channel is not None
        return self._channel

    @property
    def state(self) -> State:
        """Where it is."""
        if self.is_closed:
            return State.CLOSED
        communicator = self.communicator
        if communicator is None:
            return State.NEW
        return State.CONNECTED if communicator.is_usable else State.BROKEN

    @property
    def transports(self) -> PairTransports:
        """How bytes go between this rank and each other, by (sender, receiver); empty before they have met."""
        communicator = self.communicator
        return {} if communicator is None else communicator.transports(self.uses_memory)

    # ---- a call: "with session: check, then run or start"

    def __enter__(self) -> Channel:
        """Begin a call on this thread, which has the channel's turn from now on.

        Raises:
            SpecError: it was closed, or another thread is in a call. The other ranks are told.
            TransportError: this is a forked child.
        """
        self._context.require_own_process()
        self.calls += 1
        self._is_told = False
        channel = self._channel
        try:
            if self.is_closed or channel is None:
                raise SpecError(CLOSED_TEXT)
            if self.last_run is not None:
                self._raise_late(self.last_run)
            if not channel.turn.take(sys._getframe(1)):
                raise SpecError(channel.describe_two_threads())
        except SpecError as error:
            self.tell(error)
            raise
        return channel

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the call on this thread; what stopped it reaches the other ranks."""
        if self._channel is not None:
            self._channel.turn.give_back()
        if error is not None and error is not self._told and not isinstance(error, TransportError):
            self.tell(error)
        self._told = None

    def connect(self) -> None:
        """Compare with the other ranks what the calls are going to do, connect to them, and count calls from there on.

        Raises:
            TransportError: a rank does something else, refused, or did not come within the timeout.
        """
        self._context.require_own_process()
        number = self.calls if self.meets_always else 0
        self._connect(number, self.timeout_seconds)
        self.calls = number

    def run(
        self,
        execution: PlanExecution,
        sources: Tensors,
        destinations: Tensors,
        number: int,
        gate: SourceGate | None = None,
    ) -> None:
        """Carry one call out on this thread.

        Args:
            execution: of the plan.
            sources, destinations: checked.
            number: of the call.
            gate: opened when the sources may change.

        Raises:
            TransportError: a rank failed.
        """
        deadline = time.monotonic() + self.timeout_seconds
        if self.last_run is not None:
            self._raise_late(self.last_run)
        communicator = self.communicator
        if communicator is None or not communicator.is_usable or (self.meets_always and self._met_in_call != number):
            self._require_all(communicator)
            communicator = self._connect(number, self.timeout_seconds, by_links=True)
        try:
            self._carry_out(communicator, execution, sources, destinations, number, self.timeout_seconds, gate)
        except TransportError as failure:
            self.carry_out_anew(failure, communicator, execution, sources, destinations, number, deadline, gate)
        if self.meets_always:
            execution.release()  # nobody says when a one-shot call was the last

    def carry_out_anew(
        self,
        failure: TransportError,
        communicator: Communicator,
        execution: PlanExecution,
        sources: Tensors,
        destinations: Tensors,
        number: int,
        deadline: float,
        gate: SourceGate | None,
    ) -> None:
        """If what failed was an earlier call, which was over here, others meet for this one; else raise that."""
        remaining, (tag, begun) = deadline - time.monotonic(), self.channel.told
        told = tag if communicator.begun > begun else -1
        if self._stays_broken or not communicator.is_past(told) or remaining < MIN_RETRY_SECONDS:
            raise failure
        before = communicator.abort_reason
        if gate is not None and not gate.take_back():
            whose = f"rank {self._context.rank} cannot repeat its call, as its tensors"
            text = f"{failure}; {whose} may have changed since they were sent"
            self.abort(text)
            raise TransportError(text) from failure
        try:
            communicator = self._connect(number, remaining)
        except TransportError as error:
            raise TransportError(f"{before.text if before else ''}; then {error}") from error
        self._carry_out(communicator, execution, sources, destinations, number, deadline - time.monotonic(), gate)

    def _raise_late(self, last: Run) -> None:
        """Raise, once, what became of a call that had returned before the device was done with it. The others wait for
        this rank no longer.
        """
        if last.failure is None:
            return
        self.last_run = None
        if not last.is_told:
            if not self._stays_broken:
                self._context.rendezvous.abort(self._participants, last.failure, self._channel_name)
            raise TransportError(last.failure)

    def _require_all(self, communicator: Communicator | None) -> None:
        """Do not wait for a rank that does not come to this one again, as it or others said."""
        reason = None if communicator is None else communicator.abort_reason
        if reason is not None and reason.lost is not None and reason.tag == self.tag and not self.meets_always:
            raise TransportError(reason.text)

    def _carry_out(
        self,
        communicator: Communicator,
        execution: PlanExecution,
        sources: Tensors,
        destinations: Tensors,
        number: int,
        timeout_seconds: float,
        gate: SourceGate | None,
    ) -> None:
        channel = self._channel
        assert channel is not None
        run = communicator.begin(self.tag, number, self.identity.label, timeout_seconds, self.uses_memory)
        try:
            communicator.catch_up()
            communicator.gather(execution.groups)
            for work in execution.steps(sources, destinations, channel.staging, communicator):
                communicator.wait(work)
            if self.confirms:
                if gate is not None:
                    gate.open()
                communicator.confirm()
            self.last_run = None if run.pending is None else run
        except BaseException as error:
            self.end_badly(communicator, run, error)
        communicator.end(run, is_complete=True)

    def end_badly(self, communicator: Communicator, run: Run, error: BaseException) -> NoReturn:
        """End a call that failed, and raise what became of it."""
        try:
            if not isinstance(error, TransportError):
                communicator.abort(describe_failure(self._context.rank, str(run), error))
                self._told = error
                raise error
            self.last_run = None
            reason, rank = communicator.abort_reason, self._context.rank
            self._pass_by(reason)
            is_of_it = reason is not None and reason.tag == run.tag and reason.call in (0, run.number)
            if reason is None or not is_of_it or reason.late != rank:
                raise error
            self._context.rendezvous.note_late(self._participants, self._channel_name)
            raise TransportError(f"{error}; {describe_late(rank)}") from error
        finally:
            communicator.end(run)

    def intent(self, number: int) -> Intent:
        """What the ranks compare before a call."""
        return self.identity.intent(self._participants, self._channel_name, number, self.call_fields)

    def meet_again(self, intent: Intent, near: Near | None, number: int) -> Communicator:
        """Meet for a one-shot call, on a channel on which nothing is under way.

        Args:
            intent: of a call like this one.
            near: by what the ranks have met for that, if by links; used for nothing else.
            number: of this call.

        Raises:
            TransportError: see ``connect``.
        """
        timeout_seconds, communicator = self.timeout_seconds, self.communicator
        if near is not None and communicator is not None:
            began = time.monotonic()
            try:
                epoch = self._context.rendezvous.join_by_links(intent, near)
            except BaseException as error:
                self.channel.fail_to_meet(near, intent.call, error)
                raise
            if epoch:
                self.tag, self._met_in_call = tag_of(epoch), number
                return communicator
            timeout_seconds -= time.monotonic() - began
        return self._connect(number, timeout_seconds, by_links=True, near=near)

    def _connect(
        self, number: int, timeout_seconds: float, by_links: bool = False, near: Near | None = None
    ) -> Communicator:
        """Meet; ``by_links`` where nothing else is under way on the channel, and so nobody uses its links."""
        communicator = self.communicator
        if self._stays_broken and communicator is not None and communicator.abort_reason is not None:
            raise TransportError(communicator.abort_reason.text)
        self.identity.count()
        intent = self.intent(number)
        try:
            how = timeout_seconds, self.uses_memory, by_links, near
            tag = self.channel.connect(intent, *how, lambda: self._given_up[0])
        except BaseException as error:
            self._told, self._is_told = error, True
            problem = error.__cause__
            if isinstance(problem, ProblemError) and problem.counts_anew and not self.meets_always:
                self.calls = 0
            if not (isinstance(problem, ProblemError) and problem.is_mismatch):
                self._uncount()
            raise
        self.tag = tag
        self._met_in_call = number
        self.communicator, self._is_told = self.channel.communicator, False
        assert self.communicator is not None
        text, lost = self._given_up
        if text:
            raise self.communicator.abort(text, CallId(tag, number, self.identity.label), lost)
        if self._needs_memory and self.communicator is not communicator:
            lacking = describe_lacking(self._needs_memory, self.transports)
            if lacking is not None:
                raise self.communicator.abort(lacking, CallId(tag, number, self.identity.label))
        return self.communicator

    # ---- the end

    def close(self, execution: PlanExecution | None = None) -> None:
        """Give back what it holds, and an execution of its, as soon as what was started is done."""
        self.is_closed = True
        if self._channel is None:
            return
        last = self._channel.last_started
        if last is None or last.done():
            self._release(execution)
        else:
            self._channel.worker.submit(partial(self._release, execution))

    def _release(self, execution: PlanExecution | None) -> None:
        if execution is not None:
            execution.close()
        if self.communicator is not None:
            self._closed = weakref.ref(self.communicator)
        self.communicator = self._channel = self.last_run = None
