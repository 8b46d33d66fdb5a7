"""Plan: the immutable value in the middle. Everything before computes it, everything after obeys it."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from operator import index, itemgetter

import numpy as np

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.arguments import participants_of
from tricomm.plan.cost import MessageColumns, lower_bound_seconds, nic_seconds, simulated_seconds
from tricomm.plan.describe import describe
from tricomm.plan.ends.ends import Ends
from tricomm.plan.move import Move
from tricomm.plan.program import RankProgram, rank_program
from tricomm.plan.reduction import Reduction
from tricomm.plan.routes.strategies import Auto, Strategy
from tricomm.plan.senders.policy import SenderPolicy
from tricomm.plan.stacks import Alike, Item, Stack, alike, stacks_of_moves
from tricomm.plan.verify import require, verify_move

PLANNER_VERSION = 28
"""Raised whenever equal arguments may give another plan: ranks with different planners must not meet."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How tensors get from one layout to another: a value that can be printed, hashed, verified and simulated.

    Attributes:
        items: the tensors; one that was given alone has the name "". By rules, their pieces.
        ends: the tensors of either side as they were named.
        is_mapping: whether they were given by name.
        strategy, balance, topology, staging_nbytes: as make_plan was told.
        rank: None for the plan of all ranks; otherwise only what this rank touches was built.
        classes: items of equal layouts together.
        moves: one, or two where a source is Partial.

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
        >>> [(receive.peer, receive.nbytes) for receive in plan.for_rank(2)[0].rounds[0].receives]
        [(0, 32), (1, 32)]
    """

    items: tuple[Item, ...]
    ends: Ends
    is_mapping: bool
    strategy: Strategy | Auto
    balance: SenderPolicy
    topology: Topology
    staging_nbytes: int
    rank: int | None
    classes: tuple[Alike, ...]
    moves: tuple[Move, ...]

    @property
    def source(self) -> ShardingSpec:
        """The resolved layout that a tensor given alone has before.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> print(make_plan(one, two).source)
        float32[8/x] on (x=1: rank 0)
        """
        return self._only.source

    @property
    def destination(self) -> ShardingSpec:
        """The resolved layout that a tensor given alone has after.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R", "R"], (8, 4), "float32")
        >>> print(make_plan(rows, ShardingSpec.from_dims(Mesh([1, 2], ("y",)), ["S0", "R"])).destination)
        float32[8/y, 4] on (y=2: ranks 1-2)
        """
        return self._only.destination

    @property
    def reduction(self) -> Reduction | None:
        """What happens between the two moves of a tensor given alone that is Partial, else None.

        >>> from tricomm import Mesh, Partial, Replicate, ShardingSpec, make_plan
        >>> sums = ShardingSpec(Mesh([0, 1], ("x",)), (Partial(),), (8,), "float32")
        >>> reduction = make_plan(sums, ShardingSpec(Mesh([2], ("y",)), (Replicate(),))).reduction
        >>> reduction.op, reduction.divisor
        ('sum', 1)
        """
        return self.classes[0].reduction if self._only else None

    @property
    def is_on_the_same_ranks(self) -> bool:
        """Whether a tensor given alone is before and after on the same ranks.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> make_plan(one, two).is_on_the_same_ranks
        False
        """
        return set(self.source.mesh.ranks) == set(self.destination.mesh.ranks)

    @property
    def _only(self) -> Item:
        if self.is_mapping:
            raise PlanError("a plan of many tensors has the layouts of each in plan.items; look there")
        return self.items[0]

    @property
    def stacks(self) -> tuple[tuple[Stack, ...], ...]:
        """The tensors of each move, equal ones as one.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> (stacks,) = make_plan({"q": one, "k": one}, {"q": two, "k": two}).stacks  # of the only move
        >>> [stack.items for stack in stacks]  # both are alike
        [(0, 1)]
        """
        return tuple(move.stacks for move in self.moves)

    @property
    def participants(self) -> tuple[int, ...]:
        """Every rank of some mesh, sorted: these must all take part.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> make_plan(one, two).participants
        (0, 1, 2)
        """
        return participants_of(self.ends.specs)

    @property
    def wire_nbytes(self) -> int:
        """Count the bytes of all hops of all moves.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> make_plan(one, two).wire_nbytes
        32
        """
        self._require_global("wire_nbytes")
        return sum(move.wire_nbytes for move in self.moves)

    @property
    def minimum_nbytes(self) -> int:
        """Count the bytes that any plan must send: what each rank needs and does not hold, move by move.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> plan = make_plan(one, two)
        >>> plan.minimum_nbytes == plan.wire_nbytes  # nothing travels twice
        True
        """
        self._require_global("minimum_nbytes")
        return sum(move.minimum_nbytes for move in self.moves)

    @checks_kinds
    def lower_bound_seconds(self, topology: Topology | None = None) -> float:
        """Compute the time that no plan can beat, for its NICs are busy so long.

        For a Partial source that is the sum over its two moves.

        Args:
            topology: hosts and rates; None is the plan's own.

        Example:
            >>> from tricomm import Mesh, ShardingSpec, make_plan
            >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
            >>> from tricomm import Topology
            >>> topology = Topology(["a", "b", "c"], nic_bytes_per_second=16.0)
            >>> make_plan(one, two).lower_bound_seconds(topology)  # 32 bytes leave host a
            2.0
        """
        self._require_global("lower_bound_seconds")
        topology = topology or self.topology
        topology.check_covers(self.participants)
        return sum(lower_bound_seconds(move.tasks, topology, self.participants) for move in self.moves)

    @checks_kinds
    def simulated_seconds(self, topology: Topology | None = None) -> float:
        """Simulate the time that this plan should take.

        Args:
            topology: hosts and rates; None is the plan's own.

        Example:
            >>> from tricomm import Mesh, ShardingSpec, make_plan
            >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
            >>> from tricomm import Topology
            >>> topology = Topology(["a", "b", "c"], nic_bytes_per_second=16.0, latency_seconds=0.5)
            >>> make_plan(one, two).simulated_seconds(topology)
            2.50002
        """
        self._require_global("simulated_seconds")
        topology = topology or self.topology
        topology.check_covers(self.participants)
        return sum(simulated_seconds(MessageColumns.of(move.messages), move.hops, topology) for move in self.moves)

    @checks_kinds
    def nic_seconds(self, topology: Topology | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sum for how long each NIC sends and receives.

        Args:
            topology: hosts and rates; None is the plan's own.

        Returns:
            (NICs,) seconds of sending and (NICs,) seconds of receiving, by the topology's numbers of NICs.

        Example:
            >>> from tricomm import Mesh, ShardingSpec, make_plan
            >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
            >>> from tricomm import Topology
            >>> topology = Topology(["a", "b", "c"], nic_bytes_per_second=16.0)
            >>> sending, receiving = make_plan(one, two).nic_seconds(topology)
            >>> sending.tolist(), receiving.tolist()
            ([2.0, 0.0, 0.0], [0.0, 1.0, 1.0])
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

        Example:
            >>> from tricomm import Mesh, ShardingSpec, make_plan
            >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
            >>> (program,) = make_plan(one, two).for_rank(0)
            >>> [(send.peer, send.nbytes) for step in program.rounds for send in step.sends]
            [(1, 16), (2, 16)]
        """
        rank = index(rank)  # an array of no dims is an integer, too, and no key
        if rank < 0:
            raise PlanError(f"rank={rank} must be at least 0; give a rank, which has nothing to do off both meshes")
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

        Example:
            >>> from tricomm import Mesh, ShardingSpec, make_plan
            >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
            >>> make_plan(one, two).verify()  # returns, so nothing is lost, sent twice or waited for in a circle
        """
        self._require_global("verify")
        classes = alike(self.items)
        require(
            self.classes == classes and [move.stacks for move in self.moves] == stacks_of_moves(classes),
            "its moves do not lead from the sources of its tensors to their destinations",
        )
        for move in self.moves:
            verify_move(move)

    def fields(self) -> dict[str, str]:
        """Name the inputs that determine the plan: what ranks compare.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> make_plan(one, two).fields()["source mesh"]
        "Mesh([0], ('x',))"
        """
        return plan_fields(self)

    def digest(self) -> str:
        """Hash the inputs and the planner's version; equal digests mean equal plans.

        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> one, two = (ShardingSpec.from_dims(Mesh(at, ("x",)), ["S0"], (8,), "float32") for at in ([0], [1, 2]))
        >>> make_plan(one, two).digest() == make_plan(one, two).digest() != make_plan(two, one).digest()
        True
        """
        return plan_digest(self)

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


def plan_fields(plan: Plan) -> dict[str, str]:
    """Name the inputs of a plan, as text."""
    fields = {"planner version": str(PLANNER_VERSION)}
    known: dict[int, dict[str, str]] = {}  # tensors that are alike often share a spec
    for side, tensors in (("source", plan.ends.sources), ("destination", plan.ends.destinations)):
        for name, spec in tensors:
            of = f" of tensor {name!r}" if name else ""
            if id(spec) not in known:
                known[id(spec)] = _spec_fields(spec)
            fields.update({f"{side} {field}{of}": text for field, text in known[id(spec)].items()})
    # Ranks are told the first field in which they differ: layouts say more than what follows from them.
    return {**fields, **_common_fields(plan)}


def plan_digest(plan: Plan) -> str:
    """Hash what :func:`plan_fields` names, without the text of every tensor: tensors that are alike share theirs."""
    found = hashlib.sha256(digest_of(_common_fields(plan)).encode())
    known: dict[ShardingSpec, str] = {}  # by value: each tensor may have a spec of its own
    for side, tensors in (("source", plan.ends.sources), ("destination", plan.ends.destinations)):
        for name, spec in sorted(tensors, key=itemgetter(0)):
            of_spec = known.get(spec)
            if of_spec is None:
                of_spec = known[spec] = digest_of(_spec_fields(spec))
            found.update(f"{side} {len(name)} {name}{of_spec}".encode(errors="surrogatepass"))
    return found.hexdigest()


def _common_fields(plan: Plan) -> dict[str, str]:
    """What is not of one tensor of a side."""
    return {
        "planner version": str(PLANNER_VERSION),
        **_rule_fields(plan.ends),
        "strategy": repr(plan.strategy),
        "balance": repr(plan.balance),
        "topology": repr(plan.topology),
        "staging_bytes": repr(plan.staging_nbytes),
    }


def _rule_fields(ends: Ends) -> dict[str, str]:
    """What the rules make of which sources, by destination."""
    if ends.bound is None:
        return {}
    known: dict[int, str] = {}
    for tensor in ends.bound.tensors:
        if id(tensor.pieces) not in known:
            known[id(tensor.pieces)] = "; ".join(map(str, tensor.pieces))
    return {
        f"rule of tensor {tensor.name!r}": f"from {', '.join(tensor.sources)}: {known[id(tensor.pieces)]}"
        for tensor in ends.bound.tensors
    }


def _spec_fields(spec: ShardingSpec) -> dict[str, str]:
    return {
        "mesh": repr(spec.mesh),
        "shape": repr(spec.shape),
        "dtype": repr(spec.dtype),
        "placements": repr(spec.placements),
        "axis_order": repr(spec.axis_order),
        "holdings": repr(spec.holdings),
    }


def digest_of(fields: dict[str, str]) -> str:
    """Hash named texts by SHA-256, one by one: together those of many tensors take as much memory again."""
    found = hashlib.sha256()
    for name in sorted(fields):
        text = fields[name]
        found.update(f"{len(name)} {len(text)} {name}{text}".encode(errors="surrogatepass"))
    return found.hexdigest()
