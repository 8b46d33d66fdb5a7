"""List scheduling under a memory limit: each stage does what can be done, in an order of preference.

Where a limit leaves no room for the warm-up that would hide the hops, strict alternation of forwards and backwards
waits at every turn. The shortest schedules (bench/pipeline/solver.py finds them) then work in bursts: as many forwards
as the limit allows, then their backwards, the hops of a burst hiding behind each other. Doing whatever can be done
finds these by itself.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.schedule.actions import Action, Channel, Edge, Kind
from tricomm.pipeline.schedule.schedule import Schedule, chain


@dataclass(frozen=True, slots=True)
class Preference:
    """What a stage does when it may choose.

    Attributes:
        forward_first: whether F comes before B or I; weight gradients always come last, unless no F has room.
        patience: a W is left for later if an F or I arrives within this part of its time.
        weights_at_limit: whether a W is done as soon as the limit is reached, before any I.
    """

    forward_first: bool
    patience: float
    weights_at_limit: bool

    @property
    def is_about_weights(self) -> bool:
        """Whether it says more than which of F and I comes first."""
        return self.patience > 0 or self.weights_at_limit


PREFERENCES = tuple(
    Preference(forward_first, patience, weights_at_limit)
    for forward_first in (False, True)
    for patience in (0.0, 1.0)
    for weights_at_limit in (False, True)
)


def list_schedule(
    costs: Costs,
    microbatches: int,
    memory: Sequence[int],
    preference: Preference,
    *,
    split: bool = True,
    edges: Iterable[tuple[int, int]] = (),
) -> Schedule:
    """A schedule of one stage per pipeline rank that keeps to a limit on activations.

    Args:
        costs: of stages and channels; shared loads are not modelled.
        microbatches: M.
        memory: per stage, the most activations that it may hold, at least 1.
        preference: what comes first.
        split: whether backwards are I then W.
        edges: which stages feed which; () is the chain.
    """
    run = _Run(costs, microbatches, memory, preference, split, tuple(Edge(*edge) for edge in edges))
    return run.schedule()


class _Run:
    """One pass of the list scheduler over time."""

    def __init__(
        self,
        costs: Costs,
        microbatches: int,
        memory: Sequence[int],
        preference: Preference,
        split: bool,
        edges: tuple[Edge, ...],
    ) -> None:
        count = len(costs.stages)
        self.costs, self.microbatches, self.memory = costs, microbatches, memory
        self.preference, self.split, self.edges = preference, split, edges or chain(count)
        self.gradient = Kind.INPUT_GRADIENT if split else Kind.BACKWARD
        self.lists: list[list[Action]] = [[] for _ in range(count)]
        self.done = [dict.fromkeys(Kind, 0) for _ in range(count)]
        self.free_at = [0.0] * count
        self.channel_free: dict[Channel, float] = {}
        self.arrivals: dict[Channel, list[float]] = {}
        self.own_forward: list[list[float]] = [[] for _ in range(count)]
        firsts = [Action(stage, kind, 0) for stage in range(count) for kind in Kind if kind.is_compute]
        self.seconds = {(action.stage, action.kind): costs.seconds(action) for action in firsts}
        channels = [channel for edge in self.edges for channel in (edge.forward, edge.backward)]
        self.outputs = {
            (stage, forward): [
                (one, costs.transfer(one)) for one in channels if one.sender == stage and one.is_forward == forward
            ]
            for stage in range(count)
            for forward in (True, False)
        }
        self.inputs = {
            (stage, forward): [
                edge.forward if forward else edge.backward
                for edge in self.edges
                if (edge.destination if forward else edge.source) == stage
            ]
            for stage in range(count)
            for forward in (True, False)
        }

    def schedule(self) -> Schedule:
        events = [(0.0, stage) for stage in range(len(self.lists))]
        while events:
            now, stage = heapq.heappop(events)
            if self.free_at[stage] > now:
                continue
            kind = self.choice(stage, now)
            if kind is None:
                upcoming = self.arrivals_after(stage, now)
                if upcoming:
                    heapq.heappush(events, (min(upcoming), stage))
                continue
            for other, time in self.do(stage, kind, now):
                heapq.heappush(events, (time, other))
        return Schedule(tuple(map(tuple, self.lists)), self.edges)

    def choice(self, stage: int, now: float) -> Kind | None:
        """What a stage does now; None to wait."""
        done = self.done[stage]
        forward, gradient = self.ready_at(stage, Kind.FORWARD), self.ready_at(stage, self.gradient)
        waiting = done[Kind.INPUT_GRADIENT] - done[Kind.WEIGHT_GRADIENT]
        freed = done[Kind.WEIGHT_GRADIENT] if self.split else done[Kind.BACKWARD]
        has_room = done[Kind.FORWARD] - freed < self.memory[stage]
        wants_room = not has_room and done[Kind.FORWARD] < self.microbatches
        if waiting and wants_room and self.preference.weights_at_limit:
            return Kind.WEIGHT_GRADIENT
        choices = [(Kind.FORWARD, forward if has_room else None), (self.gradient, gradient)]
        if not self.preference.forward_first:
            choices.reverse()
        for kind, ready in choices:
            if ready is not None and ready <= now:
                return kind
        if waiting:
            if wants_room and forward is not None and forward <= now:
                return Kind.WEIGHT_GRADIENT
            soon = now + self.preference.patience * self.costs.stages[stage].weight_gradient_seconds
            if all(ready is None or ready >= soon for _, ready in choices):
                return Kind.WEIGHT_GRADIENT
        return None

    def ready_at(self, stage: int, kind: Kind) -> float | None:
        """When the inputs of a stage's next F, B or I are there; None if that is not known, or it has none left."""
        turn = self.done[stage][kind]
        if turn == self.microbatches or (kind is not Kind.FORWARD and turn >= self.done[stage][Kind.FORWARD]):
            return None
        latest = 0.0
        for channel in self.inputs[stage, kind is Kind.FORWARD]:
            arrived = self.arrivals.get(channel, [])
            if len(arrived) <= turn:
                return None
            latest = max(latest, arrived[turn])
        return latest

    def arrivals_after(self, stage: int, now: float) -> list[float]:
        times = [self.ready_at(stage, kind) for kind in (Kind.FORWARD, self.gradient)]
        return [time for time in times if time is not None and time > now]

    def do(self, stage: int, kind: Kind, now: float) -> list[tuple[int, float]]:
        """Begin an action; the stages to look at again, and when."""
        action = Action(stage, kind, self.done[stage][kind])
        self.lists[stage].append(action)
        self.done[stage][kind] += 1
        end = self.free_at[stage] = now + self.seconds[stage, kind]
        again = [(stage, end)]
        if kind is Kind.WEIGHT_GRADIENT:
            return again
        for channel, cost in self.outputs[stage, kind is Kind.FORWARD]:
            begin = max(end, self.channel_free.get(channel, 0.0))
            self.channel_free[channel] = begin + cost.busy_seconds
            arrival = begin + cost.seconds
            self.arrivals.setdefault(channel, []).append(arrival)
            again.append((channel.receiver, arrival))
        return again
