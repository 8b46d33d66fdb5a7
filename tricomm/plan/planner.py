"""make_plan: make the Plan that leads from one spec to another, or from many to as many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tricomm.errors import PlanError
from tricomm.kinds import explains_missing
from tricomm.layout.sides import Sides, as_specs
from tricomm.layout.topology import Topology
from tricomm.plan.arguments import (
    check_balance,
    check_rank,
    check_staging_bytes,
    check_strategy,
    check_topology,
    participants_of,
)
from tricomm.plan.choice import WORTH_IT, Candidate
from tricomm.plan.cost import MessageColumns, lower_bound_seconds, simulated_seconds
from tricomm.plan.ends.ends import Ends
from tricomm.plan.ends.mapped import items_and_ends, require_held
from tricomm.plan.move import Move
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.plan import PLANNER_VERSION, Plan
from tricomm.plan.product.choose import product_move, routes_of_move
from tricomm.plan.product.grid import is_held_once
from tricomm.plan.product.move import ProductMove
from tricomm.plan.routes.chunks import RouteContext
from tricomm.plan.routes.joined import Routes, joined
from tricomm.plan.routes.searched import WORTH_SAYING, check_search, deliveries_of, kept
from tricomm.plan.routes.strategies import Auto, Broadcast, SendRecv, Strategy, candidates_on
from tricomm.plan.senders.policy import Assignment, Naive, SenderPolicy
from tricomm.plan.senders.split import Split
from tricomm.plan.stacks import Item, Stack, alike, stacks_of_moves
from tricomm.plan.tasks import Tasks, most_peers, unit_tasks
from tricomm.plan.tasks import joined as joined_tasks
from tricomm.rules import BoundRules, Rules

DEFAULT_STAGING_BYTES = 256 << 20
BULK_NBYTES = 1 << 20
"""Bytes of a message from which on it does not matter that there are more messages than need be."""


@explains_missing
def make_plan(
    source: Sides,
    destination: Sides,
    *,
    topology: Topology | None = None,
    strategy: Strategy | Auto = Auto(),  # noqa: B008  an immutable value
    balance: SenderPolicy = Split(),  # noqa: B008
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    rank: int | None = None,
    rules: Rules | BoundRules | None = None,
) -> Plan:
    """Plan a reshard. Needs no process group and no torch; the same arguments give the same plan everywhere.

    Tensors of one plan share messages: what goes along the same ranks travels together, whatever tensor it is of.

    Args:
        source: where the tensor is, with shape and dtype: a ShardingSpec, ``(DeviceMesh, placements, shape, dtype)`` in
            torch's words, or a DTensor that lies so. Of many tensors, the layout of each by its name.
        destination: where it shall be; shape and dtype default to the source's. Of many tensors, the same names.
        topology: hosts and rates; None puts every rank on a host of its own.
        strategy: how elements travel.
        balance: the policy that chooses senders.
        staging_bytes: the most bytes that one rank may hold in packed chunks.
        rank: build only what this rank touches, where strategy and policy let it know that without the others.
        rules: how tensors of the destination are made of those of the source, where names, shapes or orders differ;
            then each side has its own names. Pieces go straight from shards into shards.

    Raises:
        SpecError: the specs contradict each other, the destination is Partial, or the rank is on neither mesh; an
            ArgumentError where an argument is of the wrong kind.
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
          over  4 ranks on 4 hosts, a NIC of 12.5 GB/s on each; latency 20 us (assumed; say otherwise with topology=)
          wire  128 B (minimum 128 B), NIC bound 0.00512 us, expected 60 us
          SendRecv(chunk_bytes=None), Split(): 4 tasks, 4 messages, 4 hops in 1 round, 0 local copies
            0 -> 2   8 elements in 1 chunk: [0:4, 0:2]
            0 -> 3   8 elements in 1 chunk: [0:4, 2:4]
            1 -> 2   8 elements in 1 chunk: [4:8, 0:2]
            1 -> 3   8 elements in 1 chunk: [4:8, 2:4]
    """
    check_strategy(strategy)
    check_balance(balance)
    check_topology(topology)
    check_staging_bytes(staging_bytes)
    items, ends = items_and_ends(*as_specs(source, destination), rules)
    is_mapping = isinstance(source, Mapping)
    return plan_of(items, ends, is_mapping, topology, strategy, balance, staging_bytes, rank)


def plan_of(
    items: tuple[Item, ...],
    ends: Ends,
    is_mapping: bool,
    topology: Topology | None,
    strategy: Strategy | Auto,
    balance: SenderPolicy,
    staging_bytes: int,
    rank: int | None,
) -> Plan:
    """Plan the items that :func:`items_and_ends` found; see make_plan."""
    participants = participants_of(ends.specs)
    check_rank(rank, participants)
    if topology is None:
        topology = Topology.flat(participants[-1] + 1)
    topology.check_covers(participants)
    by_rules = ends.bound is not None
    folder = strategy.cache if isinstance(strategy, Auto) else None
    try:
        return _make_plan(
            items, ends if by_rules else None, is_mapping, topology, strategy, balance, staging_bytes, rank, folder
        )
    except PlanError:
        if by_rules:
            require_held(items)  # which says for which rule
        raise


@lru_cache(maxsize=512)
def _make_plan(
    items: tuple[Item, ...],
    ends: Ends | None,
    is_mapping: bool,
    topology: Topology,
    strategy: Strategy | Auto,
    balance: SenderPolicy,
    staging_nbytes: int,
    rank: int | None,
    _folder: str | None,  # which equal strategies may differ in: what was found for one is kept for the other, too
) -> Plan:
    classes = alike(items)
    ends = ends or Ends.of(items)  # which follow from the items where there are no rules
    participants = participants_of(ends.specs)
    drafts = [
        _Draft(stacks, strategy, balance, topology, participants, staging_nbytes) for stacks in stacks_of_moves(classes)
    ]
    known_rank = rank if all(draft.is_known_to_each_rank for draft in drafts) else None
    moves = tuple(draft.made(known_rank) for draft in drafts)
    return Plan(items, ends, is_mapping, strategy, balance, topology, staging_nbytes, known_rank, classes, moves)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A move before anything is worked out.

    Attributes:
        stacks: what it moves.
        strategy, balance, topology, staging_nbytes: as asked.
        participants: all ranks of the plan, sorted.
    """

    stacks: tuple[Stack, ...]
    strategy: Strategy | Auto
    balance: SenderPolicy
    topology: Topology
    participants: tuple[int, ...]
    staging_nbytes: int

    @property
    def is_large(self) -> bool:
        """Whether so many ranks take part that each works out its own part alone where it can."""
        auto = self.strategy if isinstance(self.strategy, Auto) else Auto()
        if isinstance(self.strategy, Broadcast) and self.strategy.one_call:
            return False  # all ranks must know in which order communicators are made
        return len(self.participants) > auto.search_up_to

    @property
    def _is_compared(self) -> bool:
        """Whether few ranks take part, but of many tensors, some of them to several ranks: a search takes one strategy
        for all of them, and formulas take for each what suits it.
        """
        is_free = isinstance(self.strategy, Auto) and self.strategy.search_up_to > 0
        return is_free and not self.is_large and len(self.stacks) > 1 and not self.is_known_to_each_rank

    def _formulas(self) -> dict[int, ProductMove]:
        """What routes the stacks that formulas can route, by number."""
        if not (self.is_large or self._is_compared) or not isinstance(self.balance, Split):
            return {}
        found = {}
        for number, stack in enumerate(self.stacks):
            context = self._context([number])
            ends, has_company = (stack.source, stack.destination), len(self.stacks) > 1
            move = product_move(*ends, number, context, self.participants, self.strategy, has_company)
            if move is not None:
                found[number] = move
        return found

    def _context(self, numbers: Sequence[int]) -> RouteContext:
        """What a strategy may know that routes some stacks."""
        stacks = [self.stacks[number] for number in numbers]
        peers = most_peers([(stack.source, stack.destination) for stack in stacks])
        return RouteContext(self.topology, peers, self.staging_nbytes)

    def _is_known(self, number: int) -> bool:
        """Whether no choice for a stack depends on other ranks' tasks: there is one holder or a fixed choice, and
        unicast only.
        """
        stack = self.stacks[number]
        one_holder = is_held_once(stack.source) or isinstance(self.balance, Naive)
        one_way = is_held_once(stack.destination) or isinstance(self.strategy, SendRecv)
        return one_holder and one_way

    @property
    def is_known_to_each_rank(self) -> bool:
        """Whether a rank can find its part without the others'."""
        if self.is_large:
            return True
        return all(map(self._is_known, range(len(self.stacks))))

    def made(self, rank: int | None) -> Move:
        """The move of all ranks, or what one has part in."""
        refined = tuple(
            unit_tasks(stack.source, stack.destination, rank, number) for number, stack in enumerate(self.stacks)
        )
        formulas = self._formulas()
        if self.is_large:
            return self._apart(refined, formulas, rank)
        if not formulas:
            return self._move(refined, [self._searched(range(len(self.stacks)), refined, rank)])
        apart = self._apart(refined, formulas, rank)
        columns = MessageColumns.of(apart.messages)
        seconds = simulated_seconds(columns, apart.hops, self.topology)
        is_bulk = apart.wire_nbytes >= BULK_NBYTES * len(apart.messages)
        if is_bulk and seconds <= lower_bound_seconds(apart.tasks, self.topology, self.participants) * (1 + WORTH_IT):
            return apart  # nothing that a search finds is worth it
        together = self._searched(range(len(self.stacks)), refined, rank)
        found = simulated_seconds(MessageColumns.of(together.messages), together.hops, self.topology)
        return apart if seconds < found * (1 - WORTH_IT) else self._move(refined, [together])

    def _apart(self, refined: tuple[Tasks, ...], formulas: dict[int, ProductMove], rank: int | None) -> Move:
        """Each stack by formulas where there are such, and the others by what their ranks know."""
        others = [number for number in range(len(self.stacks)) if number not in formulas]
        known = [number for number in others if self._is_known(number)]
        groups = [known, [number for number in others if number not in known]]
        routes = [self._searched(group, refined, rank) for group in groups if group]
        routes += [self._by_formulas(formulas[number], number, rank) for number in sorted(formulas)]
        return self._move(refined, routes)

    def _move(self, refined: tuple[Tasks, ...], routes: Sequence[Routes]) -> Move:
        messages, hops = joined(routes)
        return Move(self.stacks, refined, tuple(one.strategy for one in routes), messages, hops)

    def _by_formulas(self, move: ProductMove, number: int, rank: int | None) -> Routes:
        """What formulas say of a stack; nothing to a rank that has no part in it."""
        stack = self.stacks[number]
        if rank is None or rank in stack.source.mesh or rank in stack.destination.mesh:
            return routes_of_move(move, rank)
        return Routes(SendRecv(), (), ())

    def _searched(self, numbers: Sequence[int], refined: Sequence[Tasks], rank: int | None) -> Routes:
        """The best of the strategies that may be taken for some stacks, after a choice of senders among all tasks."""
        chosen = [refined[number] for number in numbers]
        if all(map(self._is_known, numbers)):
            return self._best(numbers, chosen, rank)
        if rank is not None:
            # A choice depends on everybody's tasks.
            stacks = [self.stacks[number] for number in numbers]
            chosen = [
                unit_tasks(one.source, one.destination, None, at) for at, one in zip(numbers, stacks, strict=True)
            ]
        deliveries = deliveries_of(chosen)
        cache = self.strategy.cache if isinstance(self.strategy, Auto) and deliveries > WORTH_SAYING else None
        check_search(deliveries, cache is not None)
        if cache is None:
            return self._best(numbers, chosen, None)
        # Text of all ranks and hosts, which takes long to write.
        key = repr((PLANNER_VERSION, numbers, self.stacks, self.strategy, self.balance, self.topology))
        key += repr((self.participants, self.staging_nbytes))
        return kept(cache, key, candidates_on(Auto(), self.topology), lambda: self._best(numbers, chosen, None))

    def _best(self, numbers: Sequence[int], chosen: Sequence[Tasks], rank: int | None) -> Routes:
        """The best of the strategies, given the tasks."""
        tasks = joined_tasks(chosen)
        strategies: tuple[Strategy, ...]
        if not isinstance(self.strategy, Auto):
            strategies = (self.strategy,)
        elif any(map(_multicasts, chosen)):
            strategies = candidates_on(self.strategy, self.topology)
        else:
            strategies = (SendRecv(),)
        best: Candidate | None = None
        assignments: dict[FanOut, Sequence[Assignment]] = {}
        context = self._context(numbers)
        for one in strategies:
            if one.fan_out not in assignments:
                assignments[one.fan_out] = self.balance.assign(tasks, self.topology, one.fan_out)
            candidate = Candidate(one, assignments[one.fan_out], context, self.participants, rank)
            if best is None or candidate.is_worth_it(best):
                best = candidate
        assert best is not None
        return Routes(best.strategy, best.messages, best.hops)


def _multicasts(tasks: Tasks) -> bool:
    """True if a task has several remote receivers."""
    return not tasks.one_receiver and any(len(task.remote_receivers) > 1 for task in tasks)
