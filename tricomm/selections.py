"""What a Resharder of many tensors does with some of them, and what its calls have cost."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch

from tricomm.autograd.gradients import Gradients
from tricomm.compiled.outside import eagerly
from tricomm.errors import ArgumentError, SpecError
from tricomm.hooks import BoundHooks, Hooks
from tricomm.kinds import checks_kinds
from tricomm.packing.checksums import Checksums
from tricomm.packing.selection import Planned, Selection, checked_names
from tricomm.packing.tensor_checker import Given, TensorChecker
from tricomm.plan.describe import describe_layouts
from tricomm.plan.ends.ends import Named
from tricomm.stats import Stats, Traffic
from tricomm.transport.memory.rungs import Rung, TransportsOfRank
from tricomm.transport.runtime import PlanExecution
from tricomm.transport.session import CLOSED_TEXT, NUMBER, Session, State

Names = Collection[str]


class Selections(Gradients):
    """The half of a Resharder that is about sessions: its own, and those of selections of its tensors."""

    timeout_seconds: float
    confirm: bool
    participants: tuple[int, ...]
    _is_counted: ClassVar[bool]
    _stays_broken: ClassVar[bool]
    _planned: Planned
    _checker: TensorChecker
    _execution: PlanExecution | None
    _is_closed: bool
    _plan_seconds: float
    _group: Callable[[], Any]
    _selections: dict[frozenset[str], Self]
    _hooks: BoundHooks | None
    _checksums: Checksums | None
    _unhooked: Callable[[Given, Given], Any]

    def only(self, names: Names) -> Self:
        """The Resharder of some of the tensors: nothing is planned anew, and it goes with this one.

        Every rank that calls this Resharder calls it. ``mover(tensors, only=names)`` is ``mover.only(names)`` called
        with those of the tensors, of which it may be given all; the ranks meet once for each selection.

        ::

            attention = mover.only(["layers.0.wq", "layers.0.wo"])
            attention({"layers.0.wq": wq, "layers.0.wo": wo})

        Args:
            names: in any order, the same on all ranks.

        Raises:
            SpecError: there are no such tensors, or this is a Resharder of one; an ArgumentError for what is not names.
                The other ranks are told.
        """
        try:
            chosen = checked_names(self._planned, names)
            if self._is_closed:
                raise SpecError(CLOSED_TEXT)
            if self._hooks is not None:
                self._hooks.refuse_inside()
        except SpecError as error:
            self._name_error(error)
            session = self._speaker
            if session is not None:
                session.calls += 1
                session.tell(error)
            raise
        if len(chosen) == len(self._planned.ends.destinations):
            return self
        if chosen not in self._selections:
            self._selections[chosen] = self._selected(Selection.of(self.plan, chosen))
        return self._selections[chosen]

    def reverse(self) -> Self:
        """The Resharder back, of all tensors: from the destination's layouts to the source's, with the same options.

        Every rank makes it. Dtypes are cast back. By rules, what they fill is left out, of copies the first is read,
        and source tensors that they drop whole are not made.

        Raises:
            SpecError: the rules drop a part of a tensor, or the source is Partial, which nothing is resharded to.

        Example:
            >>> import torch, torch.distributed as dist
            >>> from tricomm import Mesh, Replicate, Resharder, ShardingSpec
            >>> from tricomm.rules import Rules, cat, source
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
            >>> one = Mesh([0], ("tp",))
            >>> parts = {name: ShardingSpec(one, (Replicate(),), (2,), "float32") for name in "qk"}
            >>> rules = Rules({"qk": cat([source("q"), source("k")])})
            >>> mover = Resharder(parts, {"qk": ShardingSpec(one, (Replicate(),))}, rules=rules)
            >>> fused = mover({"q": torch.zeros(2), "k": torch.ones(2)})
            >>> mover.reverse()(fused)
            {'q': tensor([0., 0.]), 'k': tensor([1., 1.])}
            >>> dist.destroy_process_group()
        """
        group = self._group()
        if group is None:
            raise SpecError("the process group of this Resharder is gone; keep it for as long as you call")
        ends = self.plan.ends
        rules = None if ends.bound is None else ends.bound.without_dtypes().reverse()
        source: Any = dict(ends.destinations)
        destination: Any = dict(ends.sources)
        if rules is not None:
            destination = {tensor.name: destination[tensor.name] for tensor in rules.tensors}
        if not self.plan.is_mapping:
            source, destination = source[""], destination[""]
        make: Any = type(self)
        made: Self = make(source, destination, **replace(self.options, group=group, rules=rules, hooks=None).given())
        return made

    def _selected(self, selection: Selection) -> Self:
        made = copy(self)
        made._planned, made._selections, made._plan_seconds = selection, {}, 0.0
        made._checker = TensorChecker(selection, self.rank, self.device)
        if self._checksums is not None:
            made._checksums = self._checksums.only(selection)
        if self._hooks is not None:
            made._hooks = self._hooks.only([one.name for one in selection.ends.sources])
        if self._execution is not None:
            made._execution = PlanExecution(selection, self.rank, self.device, self.options.progress)
            names = [one.name for one in selection.ends.destinations]
            count = f"{len(names)} of {len(self.plan.ends.destinations)} tensors"
            relation = f"{count}, {names[0]!r}{' and others,' if names[1:] else ','}"
            digest = "" if self._session is None else self._session.digest
            made._session = made._open({"of all tensors": digest, "only": repr(names)}, self, relation)
        return made

    def _run_here(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Move a tensor on the thread of the channel, inside of a run that was started and has the channel's turn."""
        session, execution = self._session, self._execution
        assert session is not None
        assert execution is not None
        session.calls += 1
        sources, destinations = self._checker.check(tensor, None)
        session.run(execution, sources, destinations, session.calls)
        moved: torch.Tensor | None = self._checker.result(destinations)
        return moved

    def _of_only(self, tensor: Given, out: Given, only: Names) -> tuple[Self, Given, Given]:
        """The Resharder of a selection, and what it takes of what was given."""
        chosen = self.only(only)
        every, some = self._planned.ends, chosen._planned.ends
        unhooked = [one for one in every.sources if self._hooks is None or not self._hooks.takes(one.name)]
        return chosen, _taken(tensor, unhooked, some.sources), _taken(out, every.destinations, some.destinations)

    def _call_only(self, tensor: Given, out: Given, only: Names) -> Any:
        if torch.compiler.is_compiling():
            return eagerly(self._call_only, tensor, out, only)
        mover, tensor, out = self._of_only(tensor, out, only)
        return mover._call(tensor, out)

    def _bound_hooks(self, hooks: Hooks | None) -> BoundHooks | None:
        """The hooks of all tensors, on this rank."""
        if hooks is None:
            return None
        ends = self.plan.ends
        if not self.plan.is_mapping:
            raise SpecError("hooks are called for modules by name, and one tensor alone has none; pass mappings")
        hooks.check_blocks([*ends.sources, *ends.destinations], self.rank)
        names = [[one.name for one in side] for side in (ends.sources, ends.destinations)]
        here = [{one.name for one in side if self.rank in one.spec.mesh} for side in (ends.sources, ends.destinations)]
        return hooks.bind(*names, *here)

    def _hooked(self, tensor: Given, out: Given) -> Any:
        """A call with hooks before and after it."""
        moved = self._unhooked(self._before(tensor), out)
        self._after(moved)
        return moved

    def _before(self, tensor: Given) -> Given:
        """What is sent; if a hook raises, this rank does not make the call."""
        if self._hooks is None:
            return tensor
        self._hooks.refuse_inside()
        try:
            given: Given = self._hooks.before(tensor)
        except Exception as error:
            self._tell(error)
            raise
        return given

    def _after(self, moved: Any) -> None:
        """Call the hooks of what has come; if one raises, the others have what they need all the same."""
        if self._hooks is not None:
            self._hooks.after(moved)

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
        }
        is_selection = isinstance(self._planned, Selection)
        is_counted = self._is_counted and not meets_always and (parent is None or is_selection)
        layouts = describe_layouts(self.plan)
        label = f"reshard {self.name!r}" if self.name else f"reshard {layouts}"
        if parent is not None and parent._session is not None:
            label = f"{relation} of {parent._session.label}"
            if not is_selection:
                fields["gradient of"] = parent._session.identity
        elif is_counted:
            label = f"Resharder {self.name!r} ({NUMBER})" if self.name else f"Resharder {NUMBER} of {layouts}"
        elif not meets_always:
            label = f"Resharder {self.name or layouts}"
        return Session(
            self.context,
            self.context.channel(self.participants, self.device, self.channel),
            fields,
            label,
            is_counted=is_counted,
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
        return TransportsOfRank(self.rank, {} if self._session is None else self._session.transports)

    @property
    def stats(self) -> Stats:
        """What this rank's calls have cost so far, those of selections included; of calls that were carried out.

        Example:
            >>> import torch.distributed as dist
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
        return sum((one.stats for one in self._selections.values()), self._own_stats())

    def _tensors_here(self) -> int:
        """How many tensors this rank needs, or if none, holds."""
        ends = self._planned.ends
        needed, held = (sum(self.rank in one.spec.mesh for one in side) for side in (ends.destinations, ends.sources))
        return needed or held

    def _own_stats(self) -> Stats:
        if self._execution is None:
            return Stats(plan_seconds=self._plan_seconds)
        tally = self._execution.tally
        network = "gloo" if self.device.type == "cpu" else "nccl"
        ways = self.transports
        over = {ways[pair].rung is Rung.NETWORK for pair in self._execution.pairs} if ways else {True}
        transport = network if over == {True} else "memory" if over == {False} else f"{network} and memory"
        sent = Traffic(
            transport=transport, messages=tally.messages, nbytes=tally.nbytes, wait_seconds=tally.wait_seconds
        )
        needed = sum(stack.missing_nbytes(self.rank) for stacks in self._planned.stacks for stack in stacks)
        return Stats(
            calls=tally.calls,
            tensors=tally.calls * self._tensors_here(),
            messages=tally.messages,
            nbytes=tally.nbytes,
            received_messages=tally.received_messages,
            received_nbytes=tally.received_nbytes,
            minimum_nbytes=tally.calls * needed,
            staging_nbytes=tally.staging_nbytes,
            plan_seconds=self._plan_seconds + tally.bind_seconds,
            pack_seconds=tally.pack_seconds,
            post_seconds=tally.post_seconds,
            wait_seconds=tally.wait_seconds,
            unpack_seconds=tally.unpack_seconds,
            transports=(sent,) if tally.messages or tally.received_messages else (),
        )


def _taken(given: Given, every: Sequence[Named], some: Sequence[Named]) -> Given:
    """Leave out of what was given the tensors that were not chosen; names that mean nothing stay, to be refused."""
    if not isinstance(given, Mapping):
        return given
    others = {one.name for one in every}.difference(one.name for one in some)
    return {name: tensor for name, tensor in given.items() if name not in others}
