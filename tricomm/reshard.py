"""reshard, reshard_async and Resharder: a plan carried out by the ranks of a process group."""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self, Unpack

import torch

from tricomm.autograd import ReshardFunction, gradient_scale, gradient_specs
from tricomm.errors import ArgumentError, SpecError, TransportError, TricommError
from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options, ReshardOptions
from tricomm.packing.tensor_checker import TensorChecker, check_casts
from tricomm.plan import Plan, make_plan
from tricomm.plan.arguments import check_spec
from tricomm.plan.plan import digest_of
from tricomm.transport.communicator import Communicator, GroupContext, context_of, device_of, resolve_group
from tricomm.transport.handle import Handle
from tricomm.transport.rendezvous import describe_refusal
from tricomm.transport.runtime import PlanExecution
from tricomm.transport.streams import HostStreamContext

Call = tuple[Communicator, torch.Tensor | None, torch.Tensor | None]
"""A checked call: where it runs, what it reads, what it writes."""


class Resharder:
    """A reshard made once and called often: plan, tables, staging and communicators are kept.

    Every rank of either mesh makes it, and all make the same calls in the same order, each from one thread; ranks on
    neither mesh may call too and get None. On the first call the ranks compare what they are about to do. A later
    call allocates nothing but the result (nothing at all with ``out``) and talks to nobody but the ranks it
    exchanges data with.

    Connections and a thread are shared by the Resharders of the same ranks and channel. They go when the last of
    those is closed or no longer referred to: ``close()``, or ``with Resharder(...) as mover:``.

    Args:
        source, destination: layouts; the destination's shape and dtype default to the source's.
        options: those of :class:`tricomm.Options`. Without ``confirm`` a rank returns when its own part is done.

    Raises:
        SpecError: layouts that contradict each other, or a mesh rank outside the group; an ArgumentError where there
            is no such option, or an argument is of the wrong kind.
        PlanError: an element that is needed is held by nobody.
    """

    def __init__(
        self,
        source: ShardingSpec,
        destination: ShardingSpec,
        **options: Unpack[ReshardOptions],
    ) -> None:
        group = resolve_group(options.get("group"))
        self.context: GroupContext = context_of(group)
        self.rank = self.context.rank
        try:
            chosen = Options.of(options, "Resharder")
            device = device_of(chosen.device, group)
            self.options = replace(chosen, group=group, device=device, confirm=bool(chosen.confirm))
            self.timeout_seconds = chosen.seconds
            self.device = device
            self.confirm = bool(chosen.confirm)
            self.channel = chosen.channel
            self.name = chosen.name
            for side, spec in (("source", source), ("destination", destination)):
                check_spec(side, spec)
                _check_ranks(side, spec, self.context.size)
            self.plan: Plan = make_plan(
                source,
                destination,
                strategy=chosen.strategy,
                balance=chosen.balance,
                topology=chosen.topology,
                staging_bytes=chosen.staging_bytes,
                rank=self.rank,
            )
            check_casts(self.plan)
            self.participants = self.plan.participants
            self._checker = TensorChecker(self.plan, self.rank, self.device)
            self._execution: PlanExecution | None = None
            if self.rank in self.participants:
                self._execution = PlanExecution(self.plan, self.rank, self.device)
        except TricommError as error:
            self.context.rendezvous.abort(range(self.context.size), f"{type(error).__name__}: {error}")
            raise
        self._fields = {
            **self.plan.fields(),
            "device": self.device.type,
            "confirm": str(self.confirm),
            "channel": self.channel,
            "name": self.name,
        }
        self._digest = digest_of(self._fields)
        self._communicator: Communicator | None = None
        self._meets_always = False
        self._closed_communicator: weakref.ref[Communicator] | None = None
        self._is_closed = False
        self._gradient: Resharder | None = None

    def __call__(self, tensor: torch.Tensor | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """Reshard. Arguments and result as for :func:`reshard`."""
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            self._check_differentiable(out)
            result: torch.Tensor | None = ReshardFunction.apply(tensor, self)  # type: ignore[no-untyped-call]
            return result
        call = self._prepare(tensor, out)
        if call is None:
            return None
        communicator = call[0]
        if communicator.last_started is None:
            return self._run(*call)
        if communicator.last_started.done() and communicator.last_started.exception() is None:
            communicator.stream_context.wait_event(communicator.last_started.result()[1])
            return self._run(*call)
        # What was started on the same communicator is still under way: wait in line depends_on it.
        return self._start(call, [communicator.stream_context.record_event()]).wait()

    def start(
        self,
        tensor: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        after: Any = None,
        depends_on: Sequence[Handle] = (),
    ) -> Handle:
        """Reshard in the background. The tensor must not change before ``wait`` returns.

        Runs of the same ranks and channel follow each other in the order in which they were started.

        Args:
            tensor, out: as for :func:`reshard`.
            after: on a GPU, the run begins after this event (see ``record_event``) on a stream of its own; None is all
                that the current stream has to do so far. Without ``out`` the run waits for that in any case: the memory
                of the new tensor may be that of one which the current stream has still to read.
            depends_on: runs of this rank, whatever they move, that end before this one begins.
        """
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            error = SpecError(
                "a tensor that requires grad cannot be moved in the background; pass tensor.detach(), or call the "
                "Resharder directly"
            )
            self._abort(self.participants, error)
            raise error
        if not isinstance(depends_on, Sequence) or not all(isinstance(handle, Handle) for handle in depends_on):
            error = ArgumentError(f"depends_on={depends_on!r} are not Handles; pass what start() returned, in a tuple")
            self._abort(self.participants, error)
            raise error
        call = self._prepare(tensor, out)
        if call is None:
            nothing: Future[tuple[torch.Tensor | None, Any]] = Future()
            nothing.set_result((None, None))
            return Handle(nothing, HostStreamContext())
        communicator, _, destination = call
        events = [] if after is None else [after]
        if after is None or (out is None and destination is not None):
            events.append(communicator.stream_context.record_event())
        return self._start(call, events, depends_on)

    def record_event(self) -> Any:
        """Record an event after all that the current stream has to do so far, for ``start``.

        None in host memory and before the first call.
        """
        return None if self._communicator is None else self._communicator.stream_context.record_event()

    def _start(self, call: Call, events: Sequence[Any], depends_on: Sequence[Handle] = ()) -> Handle:
        communicator = call[0]
        communicator.last_started = communicator.worker.submit(self._run_in_background, events, depends_on, *call)
        return Handle(communicator.last_started, communicator.stream_context)

    def _run_in_background(
        self,
        events: Sequence[Any],
        depends_on: Sequence[Handle],
        communicator: Communicator,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, Any]:
        """As _run, on the communicator's stream; (result, event at which it is there)."""
        with communicator.stream_context.after(events, source, destination):
            for handle in depends_on:
                handle.wait_done()
            return self._run(communicator, source, destination), communicator.stream_context.record_end()

    def gradient(self) -> "Resharder":
        """The Resharder that brings the gradient of the result back to the layout of the source.

        Where a source is Partial its contributions all get the same gradient, which for an average is still to
        be multiplied by ``gradient_scale``. With ranks on one mesh only (a pipeline), call it yourself in the
        backward pass, with the gradient on the destination's ranks and None on the others.
        """
        if self._gradient is None:
            self._gradient = Resharder(*gradient_specs(self.plan.source, self.plan.destination), **self.options.given())
            self._gradient._meets_always = self._meets_always
        return self._gradient

    @property
    def gradient_scale(self) -> float:
        """What the result of ``gradient()`` is to be multiplied by: 1, or 1/n for a Partial("avg") over n ranks."""
        return gradient_scale(self.plan.source)

    def close(self) -> None:
        """Give back what the Resharder holds, as soon as what it started is done. Later calls raise a SpecError.

        Every rank closes it, or none that another still calls.
        """
        if self._communicator is not None:
            self._closed_communicator, self._communicator = weakref.ref(self._communicator), None
        self._is_closed = True
        if self._gradient is not None:
            self._gradient.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_differentiable(self, out: torch.Tensor | None) -> None:
        plan = self.plan
        problem = None
        if out is not None:
            problem = "a tensor that requires grad cannot be moved into out; leave out=None or pass tensor.detach()"
        elif set(plan.source.mesh.ranks) != set(plan.destination.mesh.ranks):
            problem = (
                f"the tensor requires grad, but {plan.source.mesh} and {plan.destination.mesh} are different ranks, so "
                "autograd on one rank cannot reach the other; pass tensor.detach(), and in the backward pass call "
                "Resharder.gradient() on all ranks"
            )
        if problem is not None:
            error = SpecError(problem)
            self._abort(self.participants, error)
            raise error

    def connect(self) -> None:
        """Compare with the other ranks what this call is going to do, and connect to them.

        Raises:
            TransportError: a rank does something else, refused, or did not come within the timeout.
        """
        self._communicator = self.context.connect(
            self._digest, self.participants, lambda: self._fields, self.device, self.channel, self.timeout_seconds
        )

    def _prepare(self, tensor: torch.Tensor | None, out: torch.Tensor | None) -> "Call | None":
        """Check the arguments and meet where needed, all before anything is sent."""
        try:
            if self._is_closed:
                raise SpecError("a call of a Resharder that was closed; make another, or close it later")
            source = self._checker.check_source(tensor)
            destination = self._checker.check_out(out, source)
        except SpecError as error:
            self._abort(self.participants, error)
            raise
        if self._execution is None:
            return None
        if self._meets_always or self._communicator is None or self._communicator.abort_reason is not None:
            self.connect()
        assert self._communicator is not None
        return self._communicator, source, destination

    def _run(
        self, communicator: Communicator, source: torch.Tensor | None, destination: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Carry one call out on this thread."""
        assert self._execution is not None
        if communicator.abort_reason is not None:
            raise TransportError(communicator.abort_reason)
        with communicator.running(self.timeout_seconds, "in the middle of a reshard"):
            for work in self._execution.steps(source, destination, communicator.staging, communicator):
                work.wait()
            if self.confirm:
                communicator.confirm()
        return destination

    def _abort(self, participants: Sequence[int], error: TricommError) -> None:
        """An error of this rank alone must not leave the others waiting for it: tell them."""
        text = f"{type(error).__name__}: {error}"
        communicator = self._communicator
        if self._closed_communicator is not None:
            communicator = self._closed_communicator()
            if communicator is None:
                # Its connections have closed, which tells those that use them; others may wait at a rendezvous.
                self.context.rendezvous.abort_awaited(participants, text, self.channel)
                return
        if communicator is None or communicator.abort_reason is not None or self._meets_always:
            self.context.rendezvous.abort(participants, text, self.channel)
        else:
            communicator.abort(describe_refusal(self.rank, text))


def _one_shot(source: ShardingSpec, destination: ShardingSpec, given: ReshardOptions, caller: str) -> Resharder:
    """The Resharder of calls with these arguments, made in the first of them; the ranks meet in each."""
    group = resolve_group(given.get("group"))
    try:
        check_spec("source", source)
        check_spec("destination", destination)
        options = Options.of(given, caller)
    except TricommError as error:
        whole = context_of(group)
        whole.rendezvous.abort(range(whole.size), f"{type(error).__name__}: {error}")
        raise
    return _cached_resharder(source, destination, replace(options, group=group))


@lru_cache(maxsize=256)
def _cached_resharder(source: ShardingSpec, destination: ShardingSpec, options: Options) -> Resharder:
    confirm = True if options.confirm is None else options.confirm
    mover = Resharder(source, destination, **replace(options, confirm=confirm).given())
    mover._meets_always = True
    return mover


def reshard(
    tensor: torch.Tensor | None,
    source: ShardingSpec,
    destination: ShardingSpec,
    *,
    out: torch.Tensor | None = None,
    **options: Unpack[ReshardOptions],
) -> torch.Tensor | None:
    """Move a sharded tensor to another layout, on the same, other, or partly other ranks.

    Called by every rank of either mesh; others may call too and get None. Each call is checked: the ranks
    compare what they are about to do before anything is sent, and return only when all have what they need.

    Args:
        tensor: this rank's shard, shape ``source.local_shape(rank)``, any strides; None off the source mesh.
            It is not changed.
        source, destination: layouts; the destination's shape and dtype default to the source's.
        out: where the result goes, shape ``destination.local_shape(rank)``; None makes a new tensor.
        options: those of :class:`tricomm.Options`.

    Returns:
        This rank's shard of the destination; None off the destination mesh.

    Raises:
        SpecError: the layouts contradict each other, or the tensor is not the shard that its spec describes;
            nothing has been sent. An ArgumentError where there is no such option, or one of the wrong kind.
        PlanError: an element that is needed is held by nobody; nothing has been sent.
        TransportError: ranks call with different arguments, or one of them died, stopped or never called; the
            message names it. ``tensor`` is untouched, and ``out``, if given, holds garbage.
    """
    mover = _one_shot(source, destination, options, "reshard")
    return mover(tensor, out=out)


def reshard_async(
    tensor: torch.Tensor | None,
    source: ShardingSpec,
    destination: ShardingSpec,
    *,
    out: torch.Tensor | None = None,
    **options: Unpack[ReshardOptions],
) -> Handle:
    """As :func:`reshard`, in the background: ``handle.wait()`` gives the result.

    The ranks compare what they are about to do before this returns; data moves afterwards, and the tensor must
    not change until then.
    """
    mover = _one_shot(source, destination, options, "reshard_async")
    return mover.start(tensor, out=out)


def _check_ranks(side: str, spec: ShardingSpec, size: int) -> None:
    outside = [rank for rank in spec.mesh.ranks if rank >= size]
    if outside:
        raise SpecError(
            f"rank {outside[0]} of the {side} mesh {spec.mesh} is outside of the process group, which has ranks 0 to "
            f"{size - 1}; use ranks of the group, or pass the group that has them"
        )
