"""What a Resharder of many tensors does with some of them, and the Resharder back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Self

import torch

from tricomm.compiled.outside import eagerly
from tricomm.errors import SpecError
from tricomm.hooks import BoundHooks
from tricomm.packing.checksums import Checksums
from tricomm.packing.selection import Selection, checked_names
from tricomm.packing.tensor_checker import Given, TensorChecker
from tricomm.plan.ends.ends import Named
from tricomm.resharder.connected import Connected
from tricomm.resharder.staying import Staying
from tricomm.transport.runtime import PlanExecution
from tricomm.transport.session import CLOSED_TEXT

Names = Collection[str]


class Selections(Connected):
    """The part of a Resharder that makes others of it: of some of its tensors, and back."""

    _checker: TensorChecker
    _group: Callable[[], Any]
    _hooks: BoundHooks | None
    _checksums: Checksums | None
    _staying: Staying | None

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
            {'k': tensor([1., 1.]), 'q': tensor([0., 0.])}
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
        if self._staying is not None:
            made._staying = Staying(self.rank)
        if self._checksums is not None:
            made._checksums = self._checksums.only(selection)
        if self._hooks is not None:
            made._hooks = self._hooks.only([one.name for one in selection.ends.sources])
        if self._execution is not None:
            stays_in_place = self._staying is not None
            made._execution = PlanExecution(selection, self.rank, self.device, self.options.progress, stays_in_place)
            names = [one.name for one in selection.ends.destinations]
            count = f"{len(names)} of {len(self.plan.ends.destinations)} tensors"
            relation = f"{count}, {names[0]!r}{' and others,' if names[1:] else ','}"
            digest = "" if self._session is None else self._session.identity.digest
            made._session = made._open({"of all tensors": digest, "only": repr(names)}, self, relation)
        return made

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


def _taken(given: Given, every: Sequence[Named], some: Sequence[Named]) -> Given:
    """Leave out of what was given the tensors that were not chosen; names that mean nothing stay, to be refused."""
    if not isinstance(given, Mapping):
        return given
    others = {one.name for one in every}.difference(one.name for one in some)
    return {name: tensor for name, tensor in given.items() if name not in others}
