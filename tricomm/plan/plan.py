"""Plan: the immutable value in the middle. Everything before computes it, everything after obeys it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tricomm.errors import PlanError, SpecError
from tricomm.layout.dtype import ITEMSIZE, check_cast
from tricomm.layout.placement import Partial
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.choice import Routed
from tricomm.plan.chunks import Message, RouteContext
from tricomm.plan.cost import Loads, lower_bound_seconds, simulated_seconds
from tricomm.plan.describe import describe
from tricomm.plan.program import RankProgram, rank_program
from tricomm.plan.reduction import Reduction, reduction_of
from tricomm.plan.rounds import Hop
from tricomm.plan.routes import Auto, SendRecv, Strategy
from tricomm.plan.senders.policy import Assignment, Balance, FanOut, Naive
from tricomm.plan.senders.split import Split
from tricomm.plan.tasks import Task, Tasks, peer_bound, unit_tasks
from tricomm.plan.verify import require, verify_move

PLANNER_VERSION = 3
"""Raised whenever equal arguments may give another plan: ranks with different planners must not meet."""

DEFAULT_STAGING_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Move:
    """One reshard without arithmetic.

    Attributes:
        source, destination: resolved specs of one global shape.
        wire_dtype: dtype between ranks: the smaller of the two, so a cast happens where fewer bytes travel.
        strategy: the strategy that routed the messages (never Auto).
        tasks, messages, hops: the plan, from what to when.
    """

    source: ShardingSpec
    destination: ShardingSpec
    wire_dtype: str
    strategy: Strategy
    tasks: Sequence[Task]
    messages: Sequence[Message]
    hops: Sequence[Hop]

    @property
    def wire_nbytes(self) -> int:
        """Bytes over all hops."""
        numel = sum(message.numel * (len(message.chain) - 1) for message in self.messages)
        return numel * ITEMSIZE[self.wire_dtype]

    @property
    def minimum_nbytes(self) -> int:
        """Bytes that any move of this source to this destination must put on the wire: what each rank needs
        and does not hold.
        """
        return sum(task.numel * len(task.receivers) for task in self.tasks) * ITEMSIZE[self.wire_dtype]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a tensor gets from one layout to another: a value that can be printed, hashed, verified and simulated.

    Attributes:
        source, destination: resolved specs.
        strategy, balance, topology, staging_nbytes: as asked.
        rank: None for the plan of all ranks; otherwise only what this rank touches was built.
        reduction: what happens between the two moves of a Partial source, else None.
        moves: one, or two where the source is Partial.
    """

    source: ShardingSpec
    destination: ShardingSpec
    strategy: Strategy | Auto
    balance: Balance
    topology: Topology
    staging_nbytes: int
    rank: int | None
    reduction: Reduction | None
    moves: tuple[Move, ...]

    @property
    def participants(self) -> tuple[int, ...]:
        """Every rank of either mesh, sorted: those that must call."""
        return tuple(sorted({*self.source.mesh.ranks, *self.destination.mesh.ranks}))

    @property
    def wire_nbytes(self) -> int:
        """Bytes between ranks, over all moves and hops."""
        self._require_global("wire_nbytes")
        return sum(move.wire_nbytes for move in self.moves)

    @property
    def minimum_nbytes(self) -> int:
        """Bytes that the moves must put on the wire: what each rank needs and does not hold."""
        self._require_global("minimum_nbytes")
        return sum(move.minimum_nbytes for move in self.moves)

    def lower_bound_seconds(self, topology: Topology | None = None) -> float:
        """The NIC-bound optimum on a topology (the plan's own if None); for a Partial source that of its moves
        one after the other.
        """
        self._require_global("lower_bound_seconds")
        topology = topology or self.topology
        topology.check_covers(self.participants)
        return sum(
            lower_bound_seconds(move.tasks, ITEMSIZE[move.wire_dtype], topology, self.participants)
            for move in self.moves
        )

    def simulated_seconds(self, topology: Topology | None = None) -> float:
        """The time that this plan should take on a topology (the plan's own if None)."""
        self._require_global("simulated_seconds")
        topology = topology or self.topology
        topology.check_covers(self.participants)
        return sum(
            simulated_seconds(Loads.of(move.messages), move.hops, ITEMSIZE[move.wire_dtype], topology)
            for move in self.moves
        )

    def for_rank(self, rank: int) -> tuple[RankProgram, ...]:
        """What one rank does, one program per move."""
        if self.rank not in (None, rank):
            raise PlanError(
                f"this plan was built for rank {self.rank} only, not for rank {rank}; call make_plan without rank"
            )
        return _programs(_Same(self), rank)

    def verify(self) -> None:
        """Prove that every destination element arrives exactly once, that every hop has its data by then and
        that the rounds of all ranks match.

        Raises:
            PlanError: the first claim that does not hold.
        """
        self._require_global("verify")
        require(
            self.reduction == reduction_of(self.source, self.destination)
            and [(move.source, move.destination) for move in self.moves]
            == _legs(self.source, self.destination, self.reduction),
            f"its moves do not lead from {self.source} to {self.destination}",
        )
        for move in self.moves:
            verify_move(move)

    def fields(self) -> dict[str, str]:
        """The inputs that determine the plan, by name: what ranks compare."""
        return plan_fields(
            self.source,
            self.destination,
            self.strategy,
            self.balance,
            self.topology,
            self.staging_nbytes,
        )

    def digest(self) -> str:
        """A hash of the inputs and the planner's version; equal digests mean equal plans."""
        return digest_of(self.fields())

    def __str__(self) -> str:
        return describe(self)

    def _require_global(self, name: str) -> None:
        if self.rank is not None:
            raise PlanError(
                f"{name} needs the plan of all ranks, and this one was built for rank {self.rank}; "
                "call make_plan without rank"
            )


class _Same:
    """A plan as a key by identity: tensors that are alike share one plan, and to compare plans takes long."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.plan is other.plan

    def __hash__(self) -> int:
        return id(self.plan)


@lru_cache(maxsize=512)
def _programs(same: _Same, rank: int) -> tuple[RankProgram, ...]:
    return tuple(rank_program(move, rank) for move in same.plan.moves)


def make_plan(
    source: ShardingSpec,
    destination: ShardingSpec,
    *,
    topology: Topology | None = None,
    strategy: Strategy | Auto = Auto(),  # noqa: B008  an immutable value
    balance: Balance = Split(),  # noqa: B008
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    rank: int | None = None,
) -> Plan:
    """Plan a reshard. Needs no process group and no torch; the same arguments give the same plan everywhere.

    Args:
        source: layout of the tensor, with shape and dtype.
        destination: layout wanted; shape and dtype default to the source's.
        topology: hosts and rates; None puts every rank on a host of its own.
        strategy: how elements travel.
        balance: which holder sends.
        staging_bytes: the most that one rank may hold in packed chunks.
        rank: build only what this rank touches, where the strategy and balance allow to know it alone.

    Raises:
        SpecError: the specs contradict each other, or the destination is Partial.
        PlanError: an element that is needed is held by nobody.
    """
    _check_kinds(source, destination, strategy, balance)
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
    if isinstance(staging_bytes, bool) or not isinstance(staging_bytes, int) or staging_bytes <= 0:
        raise PlanError(f"staging_bytes={staging_bytes!r} must be a positive number of bytes, such as 256 << 20")
    participants = sorted({*source.mesh.ranks, *destination.mesh.ranks})
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
    balance: Balance,
    staging_nbytes: int,
    rank: int | None,
) -> Plan:
    reduction = reduction_of(source, destination)
    legs = _legs(source, destination, reduction)
    alone = all(_rank_can_plan_alone(*leg, strategy, balance) for leg in legs)
    known_rank = rank if alone else None
    participants = tuple(sorted({*source.mesh.ranks, *destination.mesh.ranks}))
    moves = tuple(
        _make_move(*leg, participants, topology, strategy, balance, staging_nbytes, known_rank) for leg in legs
    )
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


def _check_kinds(source: object, destination: object, strategy: object, balance: object) -> None:
    for name, spec in (("source", source), ("destination", destination)):
        if not isinstance(spec, ShardingSpec):
            raise SpecError(
                f"{name}={spec!r} is not a ShardingSpec; write ShardingSpec(mesh, placements, shape, dtype)"
            )
    if isinstance(strategy, type) or not (hasattr(strategy, "route") or isinstance(strategy, Auto)):
        raise PlanError(
            f"strategy={strategy!r} is not a strategy; pass Auto(), Broadcast(), LocalAllGather(), GlobalAllGather() "
            "or SendRecv()"
        )
    if isinstance(balance, type) or not hasattr(balance, "assign"):
        raise PlanError(
            f"balance={balance!r} is not a sender choice; pass Split(), LeastLoaded(), Search(), RandomizedGreedy(), "
            "Ensemble() or Naive()"
        )


def _legs(
    source: ShardingSpec, destination: ShardingSpec, reduction: Reduction | None
) -> list[tuple[ShardingSpec, ShardingSpec]]:
    """The layouts that a tensor has before and after each move."""
    if reduction is None:
        return [(source, destination)]
    return [(reduction.stacked_source, reduction.stacked_destination), (reduction.reduced, destination)]


def _rank_can_plan_alone(
    source: ShardingSpec,
    destination: ShardingSpec,
    strategy: Strategy | Auto,
    balance: Balance,
) -> bool:
    """Whether no choice depends on other ranks' tasks: one holder or a fixed choice, and unicast only."""
    return (source.exclusive or isinstance(balance, Naive)) and (
        destination.exclusive or isinstance(strategy, SendRecv)
    )


def _make_move(
    source: ShardingSpec,
    destination: ShardingSpec,
    participants: Sequence[int],
    topology: Topology,
    strategy: Strategy | Auto,
    balance: Balance,
    staging_nbytes: int,
    rank: int | None,
) -> Move:
    first, second = source.element_type, destination.element_type
    wire_dtype = first if ITEMSIZE[first] < ITEMSIZE[second] else second
    itemsize = ITEMSIZE[wire_dtype]
    tasks = unit_tasks(source, destination, rank)
    context = RouteContext(itemsize, topology, peer_bound(source, destination), staging_nbytes)
    candidates: tuple[Strategy, ...]
    if not isinstance(strategy, Auto):
        candidates = (strategy,)
    elif _multicasts(tasks):
        candidates = strategy.candidates
    else:
        candidates = (SendRecv(),)
    best: Routed | None = None
    assignments: dict[FanOut, Sequence[Assignment]] = {}
    for candidate in candidates:
        fan_out = candidate.fan_out
        if fan_out not in assignments:
            assignments[fan_out] = balance.assign(tasks, itemsize, topology, fan_out)
        routed = Routed(candidate, assignments[fan_out], context, participants, rank)
        if best is None or routed.is_worth_it(best):
            best = routed
    assert best is not None
    return Move(source, destination, wire_dtype, best.strategy, tasks, best.messages, best.hops)


def _multicasts(tasks: Tasks) -> bool:
    """Whether a task has several receivers."""
    return not tasks.one_needer and any(len(task.receivers) > 1 for task in tasks)


def plan_fields(
    source: ShardingSpec,
    destination: ShardingSpec,
    strategy: Strategy | Auto,
    balance: Balance,
    topology: Topology,
    staging_nbytes: int,
) -> dict[str, str]:
    """The inputs of a plan by name, as text."""
    fields = {"planner version": str(PLANNER_VERSION)}
    for side, spec in (("source", source), ("destination", destination)):
        fields[f"{side} mesh"] = repr(spec.mesh)
        fields[f"{side} shape"] = repr(spec.shape)
        fields[f"{side} dtype"] = repr(spec.dtype)
        fields[f"{side} placements"] = repr(spec.placements)
        fields[f"{side} axis_order"] = repr(spec.axis_order)
        fields[f"{side} holdings"] = repr(spec.holdings)
    fields["strategy"] = repr(strategy)
    fields["balance"] = repr(balance)
    fields["topology"] = repr(topology)
    fields["staging_bytes"] = repr(staging_nbytes)
    return fields


def digest_of(fields: dict[str, str]) -> str:
    """SHA-256 of named texts."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
