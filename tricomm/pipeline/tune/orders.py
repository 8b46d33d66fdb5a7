"""Candidate orders: what each stage computes in which order, without communication. Generators of pure values."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.schedule.actions import Edge
from tricomm.pipeline.schedule.generators import eager_one_f_one_b, gpipe, warm_up_of
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.pipeline.tune.greedy import PREFERENCES, list_schedule

DEPTHS = (0, 1, 2, 3)
"""Of the warm-up: 0 is 1F1B."""


@dataclass(frozen=True, slots=True)
class CandidateOrder:
    """A schedule without communication.

    Attributes:
        name: in words.
        depth: of its warm-up; None for list schedules and GPipe.
        schedule: one stage per pipeline rank.
    """

    name: str
    depth: int | None
    schedule: Schedule


def known_orders(
    stages: int, microbatches: int, edges: tuple[Edge, ...], allow_split: bool
) -> Iterator[CandidateOrder]:
    """GPipe, 1F1B and its eager forms, with whole backwards and with split ones that delay W; the simplest first."""
    yield CandidateOrder("GPipe", None, gpipe(stages, microbatches, edges=edges))
    delays = [("W after I", [0] * stages), ("W 1 later", [1] * stages)]
    delays += [(f"W {turns} per stage later", [turns * stage for stage in range(stages)]) for turns in (1, 2)]
    for depth in DEPTHS:
        name = "1F1B" if depth == 0 else f"eager 1F1B, depth {depth}"
        yield CandidateOrder(name, depth, eager_one_f_one_b(stages, microbatches, depth=depth, edges=edges))
        for text, delay in delays if allow_split else ():
            schedule = eager_one_f_one_b(stages, microbatches, depth=depth, split=True, weight_delay=delay, edges=edges)
            yield CandidateOrder(f"{name}, {text}", depth, schedule)


def list_orders(
    costs: Costs, microbatches: int, edges: tuple[Edge, ...], allow_split: bool, most_held: Sequence[int]
) -> Iterator[CandidateOrder]:
    """List schedules that hold as much as they may, and as much as the eager forms do.

    Args:
        costs: of stages and channels.
        microbatches: M.
        edges: which stages feed which.
        allow_split: whether the backward can be split.
        most_held: per stage, the most activations that it may hold.
    """
    count = len(costs.stages)
    profiles = {"full": list(most_held)} if min(most_held) < microbatches else {}
    for depth in DEPTHS[:3]:
        warm_up = [warm_up_of(stage, count, depth) for stage in range(count)]
        profiles[f"depth {depth}"] = [min(pair) for pair in zip(most_held, warm_up, strict=True)]
    for split in (True, False) if allow_split else (False,):
        for text, memory in profiles.items():
            for index, preference in enumerate(PREFERENCES):
                if not split and preference.is_about_weights:
                    continue  # there are none: another preference gives the same
                schedule = list_schedule(costs, microbatches, memory, preference, split=split, edges=edges)
                yield CandidateOrder(f"list schedule {index}, {text}, {'split' if split else 'whole'}", None, schedule)


def distinct(orders: Iterable[CandidateOrder]) -> list[CandidateOrder]:
    """Return the first of those that compute in the same order."""
    found: dict[Schedule, CandidateOrder] = {}
    for order in orders:
        found.setdefault(order.schedule, order)
    return list(found.values())
