"""What is between a Resharder and the other ranks: its session, how bytes go, and what calls have cost."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from tricomm.autograd.gradients import Gradients
from tricomm.errors import ArgumentError, TricommError
from tricomm.kinds import checks_kinds
from tricomm.packing.selection import Planned, Selection
from tricomm.plan.describe import describe_layouts
from tricomm.resharder.costs import stats_of
from tricomm.stats import Stats
from tricomm.transport.coordination.identity import NUMBER, Identity
from tricomm.transport.memory.rungs import TransportsOfRank
from tricomm.transport.runtime import PlanExecution
from tricomm.transport.session import Session, State
from tricomm.transport.telling import describe_failure


class Connected(Gradients):
    """The part of a Resharder that is about its session, and those of selections of its tensors."""

    timeout_seconds: float
    confirm: bool
    participants: tuple[int, ...]
    _is_counted: ClassVar[bool]
    _stays_broken: ClassVar[bool]
    _planned: Planned
    _execution: PlanExecution | None
    _is_closed: bool
    _plan_seconds: float
    _selections: dict[frozenset[str], Self]

    def connect(self) -> None:
        """Compare with the other ranks what the next call is going to do, and connect to them.

        ::

            mover = tricomm.Resharder(source, destination)
            mover.connect()  # before the first step, which then waits for nobody

        Raises:
            TransportError: a rank does something else, refused, or did not come within the timeout.
        """
        if self._session is not None:
            try:
                self._session.connect()
            except Exception as error:
                self._name_error(error)
                raise

    @checks_kinds
    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one does not go on: whoever waits for it gets a TransportError that says why.

        ::

            try:
                batch = next(batches)
            except OSError as error:
                mover.abort(f"rank {rank} cannot read its batch: {error}")
                raise

        Args:
            reason: a sentence that names this rank.
        """
        if not isinstance(reason, str) or not reason:
            raise ArgumentError(f'reason={reason!r} says nothing; write why, as in "rank 3 ran out of data"')
        session = self._speaker
        if session is not None and session.state is not State.BROKEN:
            session.abort(reason)

    def _leave(self, error: BaseException) -> None:
        """Tell the others that this rank failed in the block, and does not come again; of errors of ours they know."""
        speaker = self._speaker
        if speaker is None:
            return
        text = describe_failure(self.rank, f"the block of {speaker.identity.label}", error)
        every = self._session, *(one._session for one in self._selections.values())
        told = [session.give_up(text, self.rank) for session in every if session is not None]
        if not isinstance(error, TricommError) and (speaker.is_connected or not any(told)):
            speaker.leave(text)

    @property
    def _speaker(self) -> Session | None:
        """The session through which the others hear of what happens outside of a call: one that is connected."""
        every = (self._session, *(one._session for one in self._selections.values()))
        return next((one for one in every if one is not None and one.state is State.CONNECTED), self._session)

    def _open(
        self,
        fields: Mapping[str, str],
        parent: Gradients | None,
        relation: str = "",
        *,
        meets_always: bool = False,
    ) -> Session | None:
        """The session of the calls; None off the meshes.

        Args:
            fields: what the ranks compare, beside the options.
            parent: whose gradient or selection this is, if it is one.
            relation: which; of selections there may be equal ones of several parents.
            meets_always: whether the ranks meet in every call.
        """
        if self._execution is None:
            return None
        fields = {
            **fields,
            "device": self.device.type,
            "confirm": str(self.confirm),
            "channel": self.channel,
            "name": self.name,
            "checksum": str(self.options.checksum),
            "differentiable": str(self.options.differentiable),
            "grad_placements": str(self.options.grad_placements),
            "transport": self.options.transport,
            "stays_in_place": str(self.options.stays_in_place),
        }
        is_selection = isinstance(self._planned, Selection)
        is_counted = self._is_counted and not meets_always and (parent is None or is_selection)
        layouts = describe_layouts(self.plan)
        label = f"reshard {self.name!r}" if self.name else f"reshard {layouts}"
        if parent is not None and parent._session is not None:
            label = f"{relation} of {parent._session.identity.label}"
            if not is_selection:
                fields["gradient of"] = str(parent._session.identity)
        elif is_counted:
            label = f"Resharder {self.name!r} ({NUMBER})" if self.name else f"Resharder {NUMBER} of {layouts}"
        elif not meets_always:
            label = f"Resharder {self.name or layouts}"
        return Session(
            self.context,
            self.context.channel(self.participants, self.device, self.channel),
            Identity(self.context, fields, label, is_counted=is_counted, meets_always=meets_always),
            meets_always=meets_always,
            stays_broken=self._stays_broken,
            timeout_seconds=self.timeout_seconds,
            confirm=self.confirm,
            transport=self.options.transport,
            pairs=self._execution.pairs if self.options.transport == "memory" else (),
        )

    @property
    def state(self) -> State:
        """Whether it is new, connected, broken or closed; off the meshes it is new until it is closed.

        ::

            if mover.state.name == "BROKEN":
                mover = tricomm.Resharder(source, destination)
        """
        if self._session is not None:
            return self._session.state
        return State.CLOSED if self._is_closed else State.NEW

    def record_event(self) -> Any:
        """Record an event after all that the current stream has to do so far, for ``start``; None in host memory.

        ::

            written = mover.record_event()  # after what writes the tensor
            handle = mover.start(tensor, out=out, after=written)  # does not wait for what was queued since
        """
        return None if self._session is None else self._session.channel.stream_context.record_event()

    @property
    def transports(self) -> TransportsOfRank:
        """How bytes go between this rank and each other, by (sender, receiver): from memory or over the network, why
        not a better way, and what would help. Empty before the ranks have met.

        ::

            print(mover.transports)  # rank 0 to and from 1-3: process_vm_readv
            [found.reason for (sender, receiver), found in mover.transports.items() if sender == rank]
        """
        found = {} if self._session is None else self._session.transports
        if found and self._execution is not None:
            found = {**found, **self._execution.transports}
        return TransportsOfRank(self.rank, found)

    @property
    def stats(self) -> Stats:
        """What this rank's calls have cost so far, those of selections included; of calls that were carried out.

        Example:
            >>> import torch, torch.distributed as dist
            >>> from tricomm import Mesh, Replicate, Resharder, ShardingSpec
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
            >>> spec = ShardingSpec(Mesh([0], ("tp",)), (Replicate(),), (2, 3), "float32")
            >>> with Resharder(spec, spec) as mover:
            ...     for step in range(3):
            ...         _ = mover(torch.ones(2, 3))
            ...     (mover.stats.calls, mover.stats.nbytes)
            (3, 0)
            >>> dist.destroy_process_group()
        """
        own = stats_of(self._execution, self._planned, self.rank, self._plan_seconds, self.device, self.transports)
        return sum((one.stats for one in self._selections.values()), own)
