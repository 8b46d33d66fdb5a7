"""How good plans by formulas are: against the search and the lower bound, on layouts that are small enough for both."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.planner.drawn import Drawn, drawn
from bench.reshard.cases import CASES, Case
from tricomm import Auto, Plan, SendRecv, Topology, make_plan

FORMULAS, SEARCH = Auto(search_up_to=0), Auto(search_up_to=10**9)
WORSE = 1.03
BOUND = 1.05


@dataclass(frozen=True)
class Quality:
    """A move planned both ways.

    Attributes:
        move: which.
        seconds: simulated, by formulas.
        searched_seconds: simulated, by search.
        bound_seconds: that no plan can beat.
        busy_seconds: for which the busiest NIC sends, and the busiest receives, by formulas.
        searched_busy_seconds: the same, by search.
        wire_nbytes, minimum_nbytes: sent by formulas, and needed.
    """

    move: Drawn
    seconds: float
    searched_seconds: float
    bound_seconds: float
    busy_seconds: tuple[float, float]
    searched_busy_seconds: tuple[float, float]
    wire_nbytes: int
    minimum_nbytes: int

    @property
    def ratio(self) -> float:
        """To the search; 1 where nothing is sent."""
        return self.seconds / self.searched_seconds if self.searched_seconds else 1.0

    @property
    def is_worse(self) -> bool:
        """Slower than the search by more than 3 %, or off the bound by more than 5 % where the search reaches it."""
        reached = self.searched_seconds <= self.bound_seconds * BOUND
        return self.ratio > WORSE or (reached and self.seconds > self.bound_seconds * BOUND)

    @property
    def is_less_level(self) -> bool:
        """Its busiest NIC is busier than the search's by more than 5 %. Both send the minimum, so that compares bytes
        of a NIC, max over mean, in the direction in which they are more.
        """
        return max(self.busy_seconds) > max(self.searched_busy_seconds) * BOUND

    @property
    def is_less_level_in_a_direction(self) -> bool:
        """The same of what NICs send or of what they receive, also of the one that does not keep them as busy."""
        return any(
            ours > searched * BOUND
            for ours, searched in zip(self.busy_seconds, self.searched_busy_seconds, strict=True)
        )

    @property
    def is_less_level_for_nothing(self) -> bool:
        """Less level, and not faster than the search's more level plan by more than 3 %."""
        return self.is_less_level and self.ratio * WORSE > 1


def busy_seconds(plan: Plan) -> tuple[float, float]:
    """For how long the busiest NIC sends, and the busiest receives."""
    sending, receiving = (float(column.max()) for column in plan.nic_seconds())
    return sending, receiving


def quality_of(move: Drawn) -> Quality:
    """Plan a move both ways."""
    plans = [
        make_plan(move.source, move.destination, topology=move.topology, strategy=strategy)
        for strategy in (FORMULAS, SEARCH)
    ]
    plans[0].verify()
    return Quality(
        move,
        plans[0].simulated_seconds(),
        plans[1].simulated_seconds(),
        plans[0].lower_bound_seconds(),
        busy_seconds(plans[0]),
        busy_seconds(plans[1]),
        plans[0].wire_nbytes,
        plans[0].minimum_nbytes,
    )


def measured(seeds: Iterable[int]) -> list[Quality]:
    """Of the moves drawn with some seeds."""
    return [quality_of(drawn(seed)) for seed in seeds]


def table(found: Sequence[Quality]) -> str:
    """Markdown: a row for each kind of move."""
    kinds = sorted({one.move.kind for one in found})
    lines = [
        "| moves | count | to the search: median | max | above 1.03 | busier NIC above 1.05: in all, no faster, "
        "in either direction | bytes above minimum |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in [*kinds, "all"]:
        of_kind = [one for one in found if kind in ("all", one.move.kind)]
        ratios = [one.ratio for one in of_kind]
        worse, more = sum(one.is_worse for one in of_kind), sum(one.wire_nbytes > one.minimum_nbytes for one in of_kind)
        unlevel = (
            sum(one.is_less_level for one in of_kind),
            sum(one.is_less_level_for_nothing for one in of_kind),
            sum(one.is_less_level_in_a_direction for one in of_kind),
        )
        lines.append(
            f"| {kind} | {len(of_kind)} | {statistics.median(ratios):.3f} | {max(ratios):.3f} | {worse} "
            f"| {', '.join(map(str, unlevel))} | {more} |"
        )
    return "\n".join(lines)


def topology_of(case: Case) -> Topology:
    """The cluster of a case of ``bench.reshard``, at about the figures that calibration finds."""
    rates = case.cluster.rates
    return Topology(
        [f"host{host}" for host in range(len(rates)) for _ in range(case.cluster.devices)],
        {f"host{host}": 24e6 * rate for host, rate in enumerate(rates)},
        nics_per_host=case.cluster.nics,
        intra_bytes_per_second=3e9,
        latency_seconds=150e-6,
        overhead_seconds=40e-6,
    )


def table_of_cases() -> str:
    """Markdown: a row for each case of ``bench.reshard``, of a size whose bound is two seconds."""
    lines = [
        "| case | formulas to the bound | search to the bound | busiest NIC, formulas to search |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        topology = topology_of(case)
        least = make_plan(*case.make(240), topology=topology, strategy=SendRecv()).lower_bound_seconds()
        specs = case.make(max(round(2.0 / least), 1) * 240)
        plans = [make_plan(*specs, topology=topology, strategy=strategy) for strategy in (FORMULAS, SEARCH)]
        plans[0].verify()
        ratios = [plan.simulated_seconds() / plan.lower_bound_seconds() for plan in plans]
        busy = [max(busy_seconds(plan)) for plan in plans]
        lines.append(f"| {case.name} | {ratios[0]:.3f} | {ratios[1]:.3f} | {busy[0] / busy[1]:.3f} |")
    return "\n".join(lines)
