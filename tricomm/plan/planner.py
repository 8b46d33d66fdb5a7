"""make_plan: make the Plan that leads from one spec to another."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tricomm.errors import SpecError
from tricomm.layout.dtype import ITEMSIZE, check_cast
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial
from tricomm.layout.sides import Side, as_specs
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.arguments import (
    check_balance,
    check_rank,
    check_spec,
    check_staging_bytes,
    check_strategy,
    check_topology,
)
from tricomm.plan.choice import Candidate
from tricomm.plan.move import Move
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.plan import Plan
from tricomm.plan.product.choose import ProductMove
from tricomm.plan.reduction import phases, reduction_of
from tricomm.plan.routes.chunks import RouteContext
from tricomm.plan.routes.strategies import Auto, SendRecv, Strategy
from tricomm.plan.senders.policy import Assignment, Naive, SenderPolicy
from tricomm.plan.senders.split import Split
from tricomm.plan.tasks import Tasks, peer_bound, unit_tasks

DEFAULT_STAGING_BYTES = 256 << 20


def make_plan(
    source: Side,
    destination: Side,
    *,
    topology: Topology | None = None,
    strategy: Strategy | Auto = Auto(),  # noqa: B008  an immutable value
    balance: SenderPolicy = Split(),  # noqa: B008
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    rank: int | None = None,
) -> Plan:
    """Plan a reshard. Needs no process group and no torch; the same arguments give the same plan everywhere.

    Args:
        source: where the tensor is, with shape and dtype: a ShardingSpec, ``(DeviceMesh, placements, shape, dtype)`` in
            torch's words, or a DTensor that lies so.
        destination: where it shall be; shape and dtype default to the source's.
        topology: hosts and rates; None puts every rank on a host of its own.
        strategy: how elements travel.
        balance: the policy that chooses senders.
        staging_bytes: the most bytes that one rank may hold in packed chunks.
        rank: build only what this rank touches, where strategy and policy let it know that without the others.

    Raises:
        SpecError: the specs contradict each other, or the destination is Partial; an ArgumentError where an argument
            is of the wrong kind.
        PlanError: an element that is needed is held by nobody.

    Example:
        Rows on two ranks become columns on two others:

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> print(make_plan(rows, columns))
        reshard
          from  float32[8/dp, 4] on (dp=2: ranks 0-1)
          to    float32[8, 4/tp] on (tp=2: ranks 2-3)
          over  4 ranks on 4 hosts, a NIC of 12.5 GB/s on each; latency 20 us
          wire  128 B (minimum 128 B), NIC bound 0.00512 us, expected 60 us
          SendRecv(chunk_bytes=None), Split(): 4 tasks, 4 messages, 4 hops in 1 round, 0 local copies
            0 -> 2   8 elements in 1 chunk: [0:4, 0:2]
            0 -> 3   8 elements in 1 chunk: [0:4, 2:4]
            1 -> 2   8 elements in 1 chunk: [4:8, 0:2]
            1 -> 3   8 elements in 1 chunk: [4:8, 2:4]
    """
    specs = as_specs(source, destination)
    check_spec("source", specs[0])
    check_spec("destination", specs[1])
    check_strategy(strategy)
    check_balance(balance)
    check_topology(topology)
    check_staging_bytes(staging_bytes)
    check_rank(rank)
    return _checked_plan(*specs, topology, strategy, balance, staging_bytes, rank)


def _checked_plan(
    source: ShardingSpec,
    destination: ShardingSpec,
    topology: Topology | None,
    strategy: Strategy | Auto,
    balance: SenderPolicy,
    staging_bytes: int,
    rank: int | None,
) -> Plan:
    source.element_type, source.global_shape  # noqa: B018  raises if either is missing
    destination = destination.resolved(source)
    if destination.shape != source.shape:
        raise SpecError(
            f"source shape {source.shape} and destination shape {destination.shape} differ; resharding moves elements "
            "and reshapes nothing: leave the destination's shape out or make them equal"
        )
    if any(isinstance(placement, Partial) for placement in destination.placements):
        raise SpecError(
            f"destination {destination} is Partial, and there is no one way to split a value into contributions; "
            "reshard to Replicate() or Shard(dim)"
        )
    check_cast(source.element_type, destination.element_type)
    participants = _participants(source.mesh, destination.mesh)
    if topology is None:
        topology = Topology.flat(participants[-1] + 1)
    topology.check_covers(participants)
    return _make_plan(source, destination, topology, strategy, balance, staging_bytes, rank)


@lru_cache(maxsize=512)
def _make_plan(
    source: ShardingSpec,
    destination: ShardingSpec,
    topology: Topology,
    strategy: Strategy | Auto,
    balance: SenderPolicy,
    staging_nbytes: int,
    rank: int | None,
) -> Plan:
    reduction = reduction_of(source, destination)
    specs = phases(source, destination, reduction)
    participants = _participants(source.mesh, destination.mesh)
    drafts = [_Draft.of(*phase, participants, topology, strategy, balance, staging_nbytes) for phase in specs]
    known_rank = rank if all(draft.is_known_to_each_rank for draft in drafts) else None
    moves = tuple(draft.made(known_rank) for draft in drafts)
    return Plan(
        source,
        destination,
        strategy,
        balance,
        topology,
        staging_nbytes,
        known_rank,
        reduction,
        moves,
    )


@lru_cache(maxsize=64)
def _participants(source: Mesh, destination: Mesh) -> tuple[int, ...]:
    """All ranks of either mesh, sorted."""
    return tuple(sorted({*source.ranks, *destination.ranks}))


@dataclass(frozen=True, slots=True)
class _Draft:
    """A move before anything is worked out.

    Attributes:
        source, destination, wire_dtype: see Move.
        strategy, balance: as asked.
        context: what strategies may know.
        participants: all ranks of either mesh, sorted.
        formulas: what routes it where formulas do.
    """

    source: ShardingSpec
    destination: ShardingSpec
    wire_dtype: str
    strategy: Strategy | Auto
    balance: SenderPolicy
    context: RouteContext
    participants: Sequence[int]
    formulas: ProductMove | None

    @classmethod
    def of(
        cls,
        source: ShardingSpec,
        destination: ShardingSpec,
        participants: Sequence[int],
        topology: Topology,
        strategy: Strategy | Auto,
        balance: SenderPolicy,
        staging_nbytes: int,
    ) -> "_Draft":
        """Of one phase of a plan."""
        first, second = source.element_type, destination.element_type
        wire_dtype = first if ITEMSIZE[first] < ITEMSIZE[second] else second
        context = RouteContext(ITEMSIZE[wire_dtype], topology, peer_bound(source, destination), staging_nbytes)
        formulas = None
        if isinstance(strategy, Auto) and isinstance(balance, Split) and len(participants) > strategy.search_up_to:
            formulas = ProductMove.of(source, destination, context, participants)
        return cls(source, destination, wire_dtype, strategy, balance, context, participants, formulas)

    @property
    def is_known_to_each_rank(self) -> bool:
        """Whether no choice depends on other ranks' tasks: formulas make it, or else there is one holder or a fixed
        choice, and unicast only.
        """
        one_holder = self.source.exclusive or isinstance(self.balance, Naive)
        one_way = self.destination.exclusive or isinstance(self.strategy, SendRecv)
        return self.formulas is not None or (one_holder and one_way)

    def made(self, rank: int | None) -> Move:
        """The move of all ranks, or what one has part in."""
        tasks = unit_tasks(self.source, self.destination, rank)
        routes = self._searched(tasks, rank) if self.formulas is None else self.formulas.routes(rank)
        return Move(
            self.source, self.destination, self.wire_dtype, routes.strategy, tasks, routes.messages, routes.hops
        )

    def _searched(self, tasks: Tasks, rank: int | None) -> Candidate:
        """The best of the strategies that may be taken, after a choice of senders among all tasks."""
        strategies: tuple[Strategy, ...]
        if not isinstance(self.strategy, Auto):
            strategies = (self.strategy,)
        elif _multicasts(tasks):
            strategies = self.strategy.candidates
        else:
            strategies = (SendRecv(),)
        best: Candidate | None = None
        assignments: dict[FanOut, Sequence[Assignment]] = {}
        context = self.context
        for one in strategies:
            if one.fan_out not in assignments:
                assignments[one.fan_out] = self.balance.assign(tasks, context.itemsize, context.topology, one.fan_out)
            candidate = Candidate(one, assignments[one.fan_out], context, self.participants, rank)
            if best is None or candidate.is_worth_it(best):
                best = candidate
        assert best is not None
        return best


def _multicasts(tasks: Tasks) -> bool:
    """True if a task has several remote receivers."""
    return not tasks.one_receiver and any(len(task.remote_receivers) > 1 for task in tasks)
