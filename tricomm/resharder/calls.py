"""The calls of a Resharder: what is given is checked, moved at once or in the background, and given back."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic

import torch
from torch.compiler import is_dynamo_compiling

from tricomm.compiled.outside import eagerly
from tricomm.compiled.registry import is_traced
from tricomm.errors import SpecError
from tricomm.interop import is_wrapped
from tricomm.layout.sides import has_wrapped, shards_of
from tricomm.packing.holdings import Tensors
from tricomm.packing.tensor_checker import Given, bump_versions
from tricomm.resharder.repeat import remember
from tricomm.resharder.selections import Names, Selections
from tricomm.resharder.staying import Staying
from tricomm.transport.handle import Ended, Handle, Moved_co, SourceGate, order_problem
from tricomm.transport.moving.kept import Kept
from tricomm.transport.session import CLOSED_TEXT
from tricomm.transport.streams import HostStreamContext

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
"""Types of what is no DTensor, without a look."""


class Calls(Selections, Generic[Moved_co]):
    """The part of a Resharder that is called."""

    _is_taped: bool
    _fits_graphs: bool
    _names_whole_job: bool
    _call_fields: Sequence[Mapping[str, str]]
    _staying: Staying | None
    _kept: Kept | None
    """Where it has the call before, if that may come again."""

    def __call__(self, tensor: Given = None, *, out: Given = None, only: Names | None = None) -> Moved_co:
        """Reshard. Arguments and result as for :func:`reshard`.

        ``only`` names those of many tensors that move, see ``only()``; ``tensor`` and ``out`` may have the others too.
        """
        moved: Moved_co
        if (
            only is None
            and not is_dynamo_compiling()
            and self._kept is not None
            and (repeat := self._kept.repeat) is not None
            and repeat.make(tensor, out)
        ):
            moved = out  # type: ignore[assignment]
        elif only is not None:
            moved = self._call_only(tensor, out, only)
        elif is_dynamo_compiling() or (
            out is None and self._fits_graphs and is_traced(tensor) and not is_wrapped(tensor)
        ):
            from tricomm.compiled.graph import call_in_graph

            moved = call_in_graph(self, tensor, out)
        else:
            moved = (self._unhooked if self._hooks is None else self._hooked)(tensor, out)
        return moved

    def _unhooked(self, tensor: Given, out: Given) -> Any:
        if not (type(tensor) in PLAIN and type(out) in PLAIN) and (has_wrapped(tensor) or has_wrapped(out)):
            shard, place = self._shards(tensor, out)
            moved = (self._call if self._hooks is None else self._unhooked)(shard, place)
            if out is not None:
                bump_versions(out)
            return moved if out is None else out
        if self._is_taped and torch.is_grad_enabled():
            return self._recorded(tensor, out)
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            return self._differentiated(tensor, out)
        return self._move(tensor, out, requires_grad=False)

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

    def _shards(self, tensor: Any, out: Any) -> tuple[Any, Any]:
        """What DTensors hold on this rank."""
        try:
            group = None if self._names_whole_job else self._group()
            return shards_of(tensor, out, self._planned.ends, self.rank, group)
        except SpecError as error:
            self._refuse(error)

    def _move(self, tensor: Given, out: Given, *, requires_grad: bool) -> Any:
        session, execution = self._session, self._execution
        if session is None or execution is None:
            return self._off_meshes(tensor, out)
        try:
            with session as channel:
                sources, destinations = self._checked(tensor, out)
                session.call_fields = self._call_fields[requires_grad]
                last = channel.last_started
                if last is not None and (not last.done() or last.exception() is not None):
                    # What was started on the same channel is still under way: wait in line behind it.
                    self._start(sources, destinations, [channel.stream_context.record_event()], ()).wait()
                else:
                    if last is not None:
                        channel.stream_context.wait_event(last.result()[1])
                    session.run(execution, sources, destinations, session.calls)
                    if self._kept is not None and not requires_grad:
                        remember(session, execution, sources, destinations, (self.name, self._about))
            if self._checksums is not None:
                items = execution.items_of(sources, destinations)
                self._checksums.check(*items, partial(execution.unfilled, destinations))
        except Exception as error:
            self._name_error(error)
            raise
        if out is not None:
            bump_versions(out)
        return self._checker.result(destinations)

    def _checked(self, tensor: Given, out: Given) -> tuple[Tensors, Tensors]:
        sources, destinations = self._checker.check(tensor, out)
        if self._staying is not None:
            self._staying.check(self._checker.source_names, sources)
        return sources, destinations

    def start(
        self,
        tensor: Given = None,
        *,
        out: Given = None,
        after: Any = None,
        depends_on: Sequence[Handle[Any]] = (),
        only: Names | None = None,
    ) -> Handle[Moved_co]:
        """Reshard in the background. The tensor must not change before ``wait`` returns.

        Runs of the same ranks and channel follow each other in the order in which they were started. In the first call,
        or after a failure, the ranks meet in the background too, so channels may be started in any order.

        ::

            handle = mover.start(activation)
            compute_something_else()
            moved = handle.wait()

        Args:
            tensor, out: as for :func:`reshard`.
            after: on a GPU, the run begins after this event (see ``record_event``) on a stream of its own; None is all
                that the current stream has to do so far. Without ``out`` the run waits for that in any case: the memory
                of the new tensor may be that of one which the current stream has still to read.
            depends_on: runs of this rank, whatever they move, that end before this one begins.
            only: names of those of many tensors that move, see ``only()``; ``tensor`` and ``out`` may have the others
                too.
        """
        if torch.compiler.is_compiling():
            given = {"out": out, "after": after, "depends_on": depends_on, "only": only}
            handle: Handle[Moved_co] = eagerly(self.start, tensor, **given)
            return handle
        if only is not None:
            mover, tensor, out = self._of_only(tensor, out, only)
            return mover.start(tensor, out=out, after=after, depends_on=depends_on)
        if (problem := order_problem(after, depends_on)) is not None:
            self._refuse(problem)
        tensor = self._before(tensor)
        if has_wrapped(tensor) or has_wrapped(out):
            tensor, out = self._shards(tensor, out)
        session = self._session
        if session is None:
            nothing: Future[Ended] = Future()
            nothing.set_result((self._off_meshes(tensor, out), None, None))
            return Handle(nothing, HostStreamContext())
        try:
            with session as channel:
                asks = self.options.differentiable or (isinstance(tensor, torch.Tensor) and tensor.requires_grad)
                if asks and torch.is_grad_enabled():
                    raise SpecError(
                        "what requires grad cannot be moved in the background; pass tensor.detach(), call the "
                        "Resharder directly, or use torch.no_grad()"
                    )
                sources, destinations = self._checked(tensor, out)
                session.call_fields = self._call_fields[False]
                events = [] if after is None else [after]
                if after is None or (out is None and destinations):
                    events.append(channel.stream_context.record_event())
                if session.meets_always:
                    session.connect()
                if out is not None:
                    bump_versions(out)
                return self._start(sources, destinations, events, depends_on, is_whole=True)
        except Exception as error:
            self._name_error(error)
            raise

    def _off_meshes(self, tensor: Given, out: Given) -> Any:
        """A rank on neither mesh gives and gets nothing."""
        try:
            if self._is_closed:
                raise SpecError(CLOSED_TEXT)
            return self._checker.result(self._checker.check(tensor, out)[1])
        except Exception as error:
            self._name_error(error)
            raise

    def _start(
        self,
        sources: Tensors,
        destinations: Tensors,
        events: Sequence[Any],
        depends_on: Sequence[Handle[Any]],
        *,
        is_whole: bool = False,
    ) -> Handle[Moved_co]:
        """Run in the background; ``is_whole`` if digests and hooks, too, are left to that."""
        session, execution = self._session, self._execution
        assert session is not None
        assert execution is not None
        channel, number = session.channel, session.calls
        gate = SourceGate(channel.stream_context.record_end)

        def run_in_background() -> Ended:
            """On the channel's stream."""
            try:
                with channel.stream_context.after(events, *sources, *destinations):
                    for handle in depends_on:
                        handle.wait_done()
                    # Digests are of what was given, and so it may not change before they are compared.
                    early = gate if self._checksums is None else None
                    session.run(execution, sources, destinations, number, early)
                    if is_whole and self._checksums is not None:
                        items = execution.items_of(sources, destinations)
                        unfilled = partial(execution.unfilled, destinations)
                        self._checksums.check(*items, unfilled, in_background=True)
                    moved = self._checker.result(destinations)
                    if is_whole:
                        self._after(moved)
                    gate.end(end := channel.stream_context.record_end())
                    return moved, end, session.last_run
            except Exception as error:
                self._name_error(error)
                raise
            finally:
                session.started.popleft()
                gate.end()

        session.started.append(gate)
        channel.last_started = channel.worker.submit(run_in_background)
        return Handle(channel.last_started, channel.stream_context, gate)

    def _run_here(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Move a tensor on the thread of the channel, inside of a run that was started and has the channel's turn."""
        session, execution = self._session, self._execution
        assert session is not None
        assert execution is not None
        session.calls += 1
        sources, destinations = self._checked(tensor, None)
        session.run(execution, sources, destinations, session.calls)
        moved: torch.Tensor | None = self._checker.result(destinations)
        return moved
