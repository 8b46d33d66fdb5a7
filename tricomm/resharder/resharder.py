"""Resharder: a plan carried out again and again by the ranks of a process group."""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Self, Unpack, overload

import torch

from tricomm.autograd.layouts import check_differentiable_layouts
from tricomm.compiled.outside import eagerly
from tricomm.errors import SpecError
from tricomm.hooks import BoundHooks, Hooks
from tricomm.kinds import explains_missing
from tricomm.layout.sides import Side, Sides, as_specs
from tricomm.layout.spec import ShardingSpec
from tricomm.options import NO_FRILLS, Options, ReshardOptions
from tricomm.packing.checksums import Checksums
from tricomm.packing.digests import Digests
from tricomm.packing.tensor_checker import TensorChecker, check_casts
from tricomm.plan import Plan
from tricomm.plan.arguments import check_in_group, participants_of
from tricomm.plan.describe import describe_layouts
from tricomm.plan.ends.mapped import items_and_ends
from tricomm.plan.planner import plan_of
from tricomm.resharder.calls import Calls
from tricomm.resharder.staying import Staying
from tricomm.transport.group import GroupContext, context_of, device_of, is_whole_job, resolve_group
from tricomm.transport.handle import Moved_co
from tricomm.transport.runtime import PlanExecution
from tricomm.transport.telling import tell_all


@explains_missing
class Resharder(Calls[Moved_co]):
    """A reshard made once and called often: plan, copy programs, staging and connections are kept.

    Every rank of either mesh makes it and calls it; ranks on neither mesh may call too. Off the destination mesh a call
    gives None, or {} of many tensors. On the first call the ranks compare what they are about to do. A later call
    allocates nothing but the result (nothing at all with ``out``) and talks to nobody but the ranks it exchanges data
    with.

    Ranks make the same calls in the same order. If they do not, every call gives the right result or a TransportError
    that names both calls, never the bytes of another Resharder: two are told apart by their layouts and options, by
    ``name``, or by being the n-th of these that a rank has made (on NCCL without ``confirm`` the next call says so).
    Each rank counts its calls of one Resharder: if one leaves a call out, what it gives to the next one is taken for
    that, until all ``connect()`` or it ends, which the others are then told.

    Calls on one channel come from one thread at a time; a second thread is refused at once, and takes a ``channel``
    of its own. Connections and a background thread are shared by the Resharders of the same ranks and channel. They
    go when the last of those is closed or no longer referred to: ``close()``, or ``with Resharder(...) as mover:``,
    which also tells the other ranks if the block ends by an exception.

    Args:
        source, destination: layouts, also as (DeviceMesh, placements, shape, dtype) or of a DTensor; the destination's
            shape and dtype default to the source's.
        options: those of :class:`tricomm.Options`. Without ``confirm`` a rank returns when its own part is done, though
            others may raise: a loop that repeats failed calls needs it.

    Raises:
        SpecError: layouts that contradict each other, or a mesh rank outside the group; an ArgumentError where there
            is no such option, or an argument is of the wrong kind.
        PlanError: an element that is needed is held by nobody.

    Example:
        >>> import torch.distributed as dist
        >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> mesh = Mesh([0], ("tp",))
        >>> rows = ShardingSpec(mesh, (Shard(0),), (2, 3), "float32")
        >>> whole = ShardingSpec(mesh, (Replicate(),), dtype="bfloat16")
        >>> out = torch.empty(2, 3, dtype=torch.bfloat16)
        >>> with Resharder(rows, whole) as mover:
        ...     for step in range(3):
        ...         _ = mover(torch.full((2, 3), float(step)), out=out)
        >>> out
        tensor([[2., 2., 2.],
                [2., 2., 2.]], dtype=torch.bfloat16)
        >>> dist.destroy_process_group()
    """

    _is_counted: ClassVar[bool] = True
    _stays_broken: ClassVar[bool] = False

    @overload
    def __init__(
        self: "Resharder[torch.Tensor | None]", source: Side, destination: Side, **options: Unpack[ReshardOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: "Resharder[dict[str, torch.Tensor]]",
        source: Mapping[str, Side],
        destination: Mapping[str, Side],
        **options: Unpack[ReshardOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "Resharder[Any]", source: Sides, destination: Sides, **options: Unpack[ReshardOptions]
    ) -> None: ...
    def __init__(self, source: Sides, destination: Sides, **options: Unpack[ReshardOptions]) -> None:
        eagerly(self._make, source, destination, options)

    @classmethod
    def _made(
        cls,
        source: Sides,
        destination: Sides,
        options: ReshardOptions,
        *,
        parent: "Resharder[Any] | None" = None,
        meets_always: bool = False,
    ) -> "Resharder[Any]":
        """Make one for the gradients of another, or for one-shot calls, in each of which the ranks meet."""
        made = object.__new__(cls)
        made._make(source, destination, options, parent, meets_always)
        return made

    def _make(
        self,
        source: Sides,
        destination: Sides,
        options: ReshardOptions,
        parent: "Resharder[Any] | None" = None,
        meets_always: bool = False,
    ) -> None:
        group = resolve_group(options.get("group"))
        self.context: GroupContext = context_of(group)
        self.rank = self.context.rank
        self._group = weakref.ref(group)
        self._names_whole_job = is_whole_job(group)
        try:
            source, destination = specs = as_specs(source, destination, None if self._names_whole_job else group)
            self._plan(*specs, options, group, is_kept=not (meets_always or self._stays_broken))
            self._session = self._open(self.plan.fields(), parent, "the gradient", meets_always=meets_always)
        except BaseException as error:
            tell_all(self.context, error, options, source, destination)
            raise
        self._is_taped = self.options.differentiable and self._session is not None
        self._gradient = None
        self._is_closed = False
        mover_of = partial(self._mover_of_digests, group, meets_always)
        self._checksums = None if self._digests is None else Checksums(self._digests, self.device, mover_of)

    def _plan(self, source: Sides, destination: Sides, options: ReshardOptions, group: Any, is_kept: bool) -> None:
        """Everything that needs no other rank."""
        began = perf_counter()
        chosen = Options.of(options, "Resharder")
        self.device = device_of(chosen.device, group)
        self.options = replace(chosen, group=None, device=self.device, confirm=bool(chosen.confirm))
        self.timeout_seconds, self.confirm = chosen.seconds, bool(chosen.confirm)
        self.channel, self.name = chosen.channel, chosen.name
        items, ends = items_and_ends(source, destination, chosen.rules)
        check_in_group(ends.specs, self.context.size)
        participants = participants_of(ends.specs) or (self.rank,)
        # A rank on no mesh learns that from anybody's plan.
        rank = self.rank if self.rank in participants else participants[0]
        topology = chosen.topology
        if is_kept:  # else communicators of groups are not worth it
            topology = self.context.topology_with_calls(topology, participants, self.device, chosen.transport)
        how = (topology, chosen.strategy, chosen.balance, chosen.staging_bytes, rank)
        self.plan: Plan = plan_of(items, ends, isinstance(source, Mapping), *how)
        check_casts(self.plan)
        self.participants = self.plan.participants
        has_part = self.rank in self.participants
        self._digests = Digests(self.plan, self.rank) if chosen.checksum and has_part else None
        self._hooks = None if chosen.hooks is None else bound_hooks(chosen.hooks, self.plan, self.rank)
        if chosen.differentiable:
            check_differentiable_layouts(self.plan, chosen.grad_placements)
        # Ranks that are all on both meshes can ask for gradients, and then all must.
        agree = chosen.differentiable or self._is_everywhere
        asks = "whether the tensor requires grad"
        self._call_fields = [{asks: str(asked)} if agree else {} for asked in (False, True)]
        self.in_graph = self._facts_for_graphs()
        self._fits_graphs = self.in_graph is not None and not chosen.differentiable
        self._checker = TensorChecker(self.plan, self.rank, self.device)
        self._execution: PlanExecution | None = None
        stays_in_place = chosen.stays_in_place and is_kept
        self._staying = Staying(self.rank) if stays_in_place else None
        if has_part:
            self._execution = PlanExecution(self.plan, self.rank, self.device, chosen.progress, stays_in_place)
        self._kept = None
        if self._execution is not None and not self._stays_broken and self._is_plain(chosen, stays_in_place):
            self._kept = self._execution.kept
        self._planned, self._selections = self.plan, {}
        self._plan_seconds = perf_counter() - began

    def _is_plain(self, chosen: Options, stays_in_place: bool) -> bool:
        """Whether its calls do no more than to move one tensor as it is."""
        frills = stays_in_place, chosen.differentiable, chosen.checksum, chosen.progress, self.plan.ends.bound
        return not (any(frills) or self.plan.is_mapping or len(self.plan.stacks) > 1)

    def _mover_of_gradient(self, source: ShardingSpec, destination: ShardingSpec) -> "Resharder[Any]":
        group = self._group()
        if group is None:
            raise SpecError("the process group of this Resharder is gone; keep it for as long as you call")
        meets_always = self._session is not None and self._session.meets_always
        options = replace(self.options, group=group, **NO_FRILLS).given()
        return Resharder._made(source, destination, options, parent=self, meets_always=meets_always)

    def _mover_of_digests(
        self, group: Any, meets_always: bool, source: ShardingSpec, destination: ShardingSpec, what: str
    ) -> "Resharder[Any]":
        about = self.name or describe_layouts(self.plan)
        options = replace(self.options, group=group, name=f"{what} of {about}", rules=None, **NO_FRILLS).given()
        made = Resharder._made(source, destination, options, meets_always=meets_always)
        made._about = about
        return made

    def __repr__(self) -> str:
        return f"<Resharder {self.name or describe_layouts(self.plan)}: {self.state.value}>"

    def close(self) -> None:
        """Give back what the Resharder holds, as soon as what it started is done. Later calls raise a SpecError.

        Every rank closes it, or none that another still calls.

        ::

            mover.close()  # or use it as ``with Resharder(...) as mover:``
        """
        self._is_closed = True
        if self._session is not None:
            self._session.close(self._execution)
        if self._staying is not None:
            self._staying.close()
        for one in (self._gradient, *(self._checksums.movers if self._checksums else ()), *self._selections.values()):
            if one is not None:
                one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._leave(error)
        self.close()


def bound_hooks(hooks: Hooks, plan: Plan, rank: int) -> BoundHooks:
    """The hooks of all tensors of a plan, on one rank.

    Raises:
        SpecError: the plan is of one tensor, which has no name; or hooks that do not fit the tensors.
    """
    ends = plan.ends
    if not plan.is_mapping:
        raise SpecError("hooks are called for modules by name, and one tensor alone has none; pass mappings")
    hooks.check_blocks([*ends.sources, *ends.destinations], rank)
    names = [[one.name for one in side] for side in (ends.sources, ends.destinations)]
    here = [{one.name for one in side if rank in one.spec.mesh} for side in (ends.sources, ends.destinations)]
    return hooks.bind(*names, *here)
