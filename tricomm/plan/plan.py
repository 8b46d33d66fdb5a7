"""Plan: the immutable value in the middle. Everything before computes it, everything after obeys it."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.layout.dtype import ITEMSIZE
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.cost import MessageColumns, lower_bound_seconds, nic_seconds, simulated_seconds
from tricomm.plan.describe import describe
from tricomm.plan.move import Move
from tricomm.plan.program import RankProgram, rank_program
from tricomm.plan.reduction import Reduction, phases, reduction_of
from tricomm.plan.routes.strategies import Auto, Strategy
from tricomm.plan.senders.policy import SenderPolicy
from tricomm.plan.verify import require, verify_move

PLANNER_VERSION = 5
"""Raised whenever equal arguments may give another plan: ranks with different planners must not meet."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a tensor gets from one spec to another: a value that can be printed, hashed, verified and simulated.

    Attributes:
        source, destination: resolved specs.
        strategy, balance, topology, staging_nbytes: as make_plan was told.
        rank: None for the plan of all ranks; otherwise only what this rank touches was built.
        reduction: what happens between the two moves of a Partial source, else None.
        moves: one, or two where the source is Partial.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> plan = make_plan(rows, columns)
        >>> plan.participants, plan.wire_nbytes, plan.minimum_nbytes
        ((0, 1, 2, 3), 128, 128)
        >>> plan.verify()  # raises PlanError if an element were lost, sent twice, or sent before it is there
        >>> plan.simulated_seconds() >= plan.lower_bound_seconds()
        True
        >>> [(receive.peer, receive.numel) for receive in plan.for_rank(2)[0].rounds[0].receives]
        [(0, 8), (1, 8)]
    """

    source: ShardingSpec
    destination: ShardingSpec
    strategy: Strategy | Auto
    balance: SenderPolicy
    topology: Topology
    staging_nbytes: int
    rank: int | None
    reduction: Reduction | None
    moves: tuple[Move, ...]

    @property
    def participants(self) -> tuple[int, ...]:
        """Every rank of either mesh, sorted: these must all take part."""
        return tuple(sorted({*self.source.mesh.ranks, *self.destination.mesh.ranks}))

    @property
    def wire_nbytes(self) -> int:
        """Count the bytes of all hops of all moves."""
        self._require_global("wire_nbytes")
        return sum(move.wire_nbytes for move in self.moves)

    @property
    def minimum_nbytes(self) -> int:
        """Count the bytes that any plan must send: what each rank needs and does not hold, move by move."""
        self._require_global("minimum_nbytes")
        return sum(move.minimum_nbytes for move in self.moves)

    @checks_kinds
    def lower_bound_seconds(self, topology: Topology | None = None) -> float:
        """Compute the time that no plan can beat, for its NICs are busy so long.

        For a Partial source that is the sum over its two moves.

        Args:
            topology: hosts and rates; None is the plan's own.
        """
        self._require_global("lower_bound_seconds")
        topology = topology or self.topology
        topology.check_covers(self.participants)
        return sum(
            lower_bound_seconds(move.tasks, ITEMSIZE[move.wire_dtype], topology, self.participants)
            for move in self.moves
        )

    @checks_kinds
    def simulated_seconds(self, topology: Topology | None = None) -> float:
        """Simulate the time that this plan should take.

        Args:
            topology: hosts and rates; None is the plan's own.
        """
        self._require_global("simulated_seconds")
        topology = topology or self.topology
        topology.check_covers(self.participants)
        return sum(
            simulated_seconds(MessageColumns.of(move.messages), move.hops, ITEMSIZE[move.wire_dtype], topology)
            for move in self.moves
        )

    @checks_kinds
    def nic_seconds(self, topology: Topology | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sum for how long each NIC sends and receives.

        Args:
            topology: hosts and rates; None is the plan's own.

        Returns:
            (NICs,) seconds of sending and (NICs,) seconds of receiving, by the topology's numbers of NICs.
        """
        self._require_global("nic_seconds")
        topology = topology or self.topology
        topology.check_covers(self.participants)
        return nic_seconds(self.moves, topology)

    @checks_kinds
    def for_rank(self, rank: int) -> tuple[RankProgram, ...]:
        """List what one rank does, one program per move.

        Raises:
            PlanError: the plan was built for another rank only.
        """
        if self.rank not in (None, rank):
            raise PlanError(
                f"this plan was built for rank {self.rank} only, not for rank {rank}; call make_plan without rank"
            )
        return _programs(_ByIdentity(self), rank)

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
            == phases(self.source, self.destination, self.reduction),
            f"its moves do not lead from {self.source} to {self.destination}",
        )
        for move in self.moves:
            verify_move(move)

    def fields(self) -> dict[str, str]:
        """Name the inputs that determine the plan: what ranks compare."""
        return plan_fields(
            self.source,
            self.destination,
            self.strategy,
            self.balance,
            self.topology,
            self.staging_nbytes,
        )

    def digest(self) -> str:
        """Hash the inputs and the planner's version; equal digests mean equal plans."""
        return digest_of(self.fields())

    def __str__(self) -> str:
        return describe(self)

    def _require_global(self, name: str) -> None:
        if self.rank is not None:
            raise PlanError(
                f"{name} needs the plan of all ranks, and this one was built for rank {self.rank}; "
                "call make_plan without rank"
            )


class _ByIdentity:
    """A plan as a key by identity: equal tensors share one plan, and comparing plans by value takes long."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.plan is other.plan

    def __hash__(self) -> int:
        return id(self.plan)


@lru_cache(maxsize=512)
def _programs(key: _ByIdentity, rank: int) -> tuple[RankProgram, ...]:
    return tuple(rank_program(move, rank) for move in key.plan.moves)


def plan_fields(
    source: ShardingSpec,
    destination: ShardingSpec,
    strategy: Strategy | Auto,
    balance: SenderPolicy,
    topology: Topology,
    staging_nbytes: int,
) -> dict[str, str]:
    """Name the inputs of a plan, as text."""
    fields = {"planner version": str(PLANNER_VERSION)}
    for name, spec in (("source", source), ("destination", destination)):
        fields[f"{name} mesh"] = repr(spec.mesh)
        fields[f"{name} shape"] = repr(spec.shape)
        fields[f"{name} dtype"] = repr(spec.dtype)
        fields[f"{name} placements"] = repr(spec.placements)
        fields[f"{name} axis_order"] = repr(spec.axis_order)
        fields[f"{name} holdings"] = repr(spec.holdings)
    fields["strategy"] = repr(strategy)
    fields["balance"] = repr(balance)
    fields["topology"] = repr(topology)
    fields["staging_bytes"] = repr(staging_nbytes)
    return fields


def digest_of(fields: dict[str, str]) -> str:
    """Hash named texts by SHA-256."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
