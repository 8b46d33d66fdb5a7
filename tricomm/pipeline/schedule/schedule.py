"""Schedule: who computes, sends and receives what, in which order. An immutable value; nothing here runs it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from tricomm.errors import ArgumentError, PlanError
from tricomm.kinds import checks_kinds, explains_fields, explains_kinds, refuse_wrong_kinds
from tricomm.pipeline.schedule.actions import MAX_STAGES, Action, Channel, Edge, Kind


@checks_kinds
def chain(stages: int) -> tuple[Edge, ...]:
    """Each stage feeds the next one.

    Example:
        >>> [str(edge) for edge in chain(3)]
        ['0-1', '1-2']
    """
    if not 1 <= stages <= MAX_STAGES:
        raise PlanError(f"stages={stages} must be from 1 to {MAX_STAGES}; give the stages of one pipeline")
    return tuple(Edge(stage, stage + 1) for stage in range(stages - 1))


_Channels = dict[tuple[int, Kind], tuple[Channel, ...]]
"""By stage and kind of action."""


@explains_fields
@dataclass(frozen=True, slots=True)
class Schedule:
    """The list of actions of each pipeline rank of a pipeline.

    A *pipeline rank* is a group of ranks that runs one list, all of them the same. It usually holds one stage; with
    interleaving it holds several. Edges between stages of one pipeline rank need no communication.

    Attributes:
        lists: per pipeline rank, its actions in order.
        edges: which stages feed which; () means the chain of all stages. An edge between stages that are no
            neighbours is a skip connection.
        channels: the directed edges that need communication: those between two pipeline ranks, forward and, if there
            are backwards, backward.
        has_backward: whether it trains; a schedule of forwards only evaluates.

    Raises:
        PlanError: a stage at two pipeline ranks or at none, an action that is missing, twice or both whole and split,
            or an edge that joins no two stages.

    Example:
        >>> schedule = Schedule.parse(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])
        >>> schedule.stages, schedule.microbatches, schedule.has_communication
        (2, 2, False)
        >>> [str(channel) for channel in schedule.channels]
        ['0>1', '1>0']
    """

    lists: tuple[tuple[Action, ...], ...]
    edges: tuple[Edge, ...] = ()
    channels: tuple[Channel, ...] = field(init=False, repr=False, compare=False)
    has_backward: bool = field(init=False, repr=False, compare=False)
    _pipeline_rank_of: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _microbatches: int = field(init=False, repr=False, compare=False)
    _split: frozenset[tuple[int, int]] = field(init=False, repr=False, compare=False)
    _inputs: _Channels = field(init=False, repr=False, compare=False)
    _outputs: _Channels = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        if isinstance(self.edges, str | bytes):
            raise ArgumentError(f"edges={self.edges!r} must be pairs of stages; write [(0, 1), (1, 2)]")
        set_field(self, "lists", tuple(tuple(actions) for actions in self.lists))
        set_field(self, "_pipeline_rank_of", _pipeline_ranks(self.lists))
        split = (one for one in self.actions() if one.kind is Kind.INPUT_GRADIENT)
        set_field(self, "_split", frozenset((one.stage, one.microbatch) for one in split))
        set_field(self, "_microbatches", _checked_microbatches(self))
        set_field(self, "has_backward", any(one.kind.gives_gradient for one in self.actions()))
        edges = tuple(dict.fromkeys(Edge(*edge) for edge in self.edges)) or chain(self.stages)
        set_field(self, "edges", _checked_edges(edges, self.stages))
        set_field(self, "_inputs", _channels_by_action(edges, by_receiver=True))
        set_field(self, "_outputs", _channels_by_action(edges, by_receiver=False))
        crossing = [
            edge for edge in edges if self.pipeline_rank_of(edge.source) != self.pipeline_rank_of(edge.destination)
        ]
        both = ((edge.forward, edge.backward) if self.has_backward else (edge.forward,) for edge in crossing)
        set_field(self, "channels", tuple(channel for pair in both for channel in pair))

    @classmethod
    @checks_kinds
    def parse(cls, lists: Iterable[str], edges: Iterable[tuple[int, int]] = ()) -> "Schedule":
        """One text per pipeline rank, its actions separated by spaces: ``Schedule.parse(["0F0 0B0", "1F0 1B0"])``.

        >>> skipping = Schedule.parse(["0F0", "1F0", "2F0"], edges=[(0, 1), (1, 2), (0, 2)])
        >>> print(*skipping.edges)
        0-1 1-2 0-2
        """
        actions = tuple(tuple(Action.parse(word) for word in text.split()) for text in lists)
        return cls(actions, tuple(Edge(*edge) for edge in edges))

    @property
    def pipeline_ranks(self) -> int:
        """How many pipeline ranks there are.

        >>> Schedule.parse(["0F0 2F0", "1F0 3F0"]).pipeline_ranks
        2
        """
        return len(self.lists)

    @property
    def stages(self) -> int:
        """How many stages there are.

        >>> Schedule.parse(["0F0 2F0", "1F0 3F0"]).stages
        4
        """
        return len(self._pipeline_rank_of)

    @property
    def microbatches(self) -> int:
        """How many microbatches each stage computes.

        >>> Schedule.parse(["0F0 0F1 0F2"]).microbatches
        3
        """
        return self._microbatches

    @explains_kinds
    def pipeline_rank_of(self, stage: int) -> int:
        """The pipeline rank that holds a stage.

        >>> Schedule.parse(["0F0 2F0", "1F0 3F0"]).pipeline_rank_of(stage=3)
        1
        """
        count = len(self._pipeline_rank_of)
        if type(stage) is not int:
            refuse_wrong_kinds(Schedule.pipeline_rank_of, stage=stage)
        if not 0 <= stage < count:
            raise PlanError(f"stage {stage} is not of this schedule, which has {count}; count from 0")
        return self._pipeline_rank_of[stage]

    @property
    def pipeline_rank_by_stage(self) -> tuple[int, ...]:
        """The pipeline rank of each stage.

        >>> Schedule.parse(["0F0 2F0", "1F0 3F0"]).pipeline_rank_by_stage
        (0, 1, 0, 1)
        """
        return self._pipeline_rank_of

    @property
    def positions(self) -> int:
        """The old name of ``pipeline_ranks``, kept for one version.

        >>> Schedule.parse(["0F0", "1F0"]).positions
        2
        """
        return self.pipeline_ranks

    @explains_kinds
    def position_of(self, stage: int) -> int:
        """The old name of ``pipeline_rank_of``, kept for one version.

        >>> Schedule.parse(["0F0 2F0", "1F0 3F0"]).position_of(3)
        1
        """
        return self.pipeline_rank_of(stage)

    @checks_kinds
    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds.

        >>> Schedule.parse(["0F0 2F0", "1F0 3F0"]).stages_of(pipeline_rank=0)
        (0, 2)
        """
        if not 0 <= pipeline_rank < self.pipeline_ranks:
            raise PlanError(
                f"pipeline rank {pipeline_rank} is not of this schedule, which has {self.pipeline_ranks}; count from 0"
            )
        return tuple(stage for stage, at in enumerate(self._pipeline_rank_of) if at == pipeline_rank)

    @property
    def is_split(self) -> bool:
        """Whether some backward is split into I and W.

        >>> Schedule.parse(["0F0 0I0 0W0"]).is_split, Schedule.parse(["0F0 0B0"]).is_split
        (True, False)
        """
        return bool(self._split)

    @property
    def has_communication(self) -> bool:
        """Whether sends and receives have been put in.

        >>> from tricomm.pipeline import gpipe, with_communication
        >>> gpipe(2, 2).has_communication, with_communication(gpipe(2, 2)).has_communication
        (False, True)
        """
        return any(not action.is_compute for action in self.actions())

    @explains_kinds
    def gradient_of(self, stage: int, microbatch: int) -> Action:
        """The B or I that gives the gradient of a stage's inputs.

        >>> print(Schedule.parse(["0F0 0I0 0W0"]).gradient_of(stage=0, microbatch=0))
        0I0
        """
        return Action(stage, Kind.INPUT_GRADIENT if (stage, microbatch) in self._split else Kind.BACKWARD, microbatch)

    @explains_kinds
    def producer(self, channel: Channel, microbatch: int) -> Action:
        """The F, B or I that gives what a channel carries.

        >>> schedule = Schedule.parse(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])
        >>> print(schedule.producer(Channel(1, 0), 1), schedule.producer(Channel(0, 1), 1))
        1B1 0F1
        """
        if channel.is_forward:
            return Action(channel.sender, Kind.FORWARD, microbatch)
        return self.gradient_of(channel.sender, microbatch)

    def actions(self) -> Iterator[Action]:
        """All actions, pipeline rank by pipeline rank.

        >>> print(*Schedule.parse(["0F0 0B0", "1F0 1B0"]).actions())
        0F0 0B0 1F0 1B0
        """
        for actions in self.lists:
            yield from actions

    @checks_kinds
    def with_lists(self, lists: Iterable[Sequence[Action]]) -> "Schedule":
        """Return the same computation with other sends and receives among it; nothing is checked again.

        >>> schedule = Schedule.parse(["0F0", "1F0"])
        >>> sending = schedule.with_lists([[*schedule.lists[0], Action.parse("0SEND_F0")], *schedule.lists[1:]])
        >>> print(sending)
        0: 0F0 0SEND_F0
        1: 1F0
        """
        return relisted(self, lists)

    def compute_only(self) -> "Schedule":
        """The same schedule without sends and receives.

        >>> from tricomm.pipeline import gpipe, with_communication
        >>> with_communication(gpipe(2, 2)).compute_only() == gpipe(2, 2)
        True
        """
        return relisted(self, ([one for one in actions if one.is_compute] for actions in self.lists))

    @explains_kinds
    def ends_microbatch(self, action: Action) -> bool:
        """Whether its stage needs nothing more of its microbatch afterwards.

        >>> schedule = Schedule.parse(["0F0 0I0 0W0"])
        >>> [schedule.ends_microbatch(action) for action in schedule.actions()]
        [False, False, True]
        """
        return action.kind.ends_microbatch if self.has_backward else action.kind is Kind.FORWARD

    def forward_only(self) -> "Schedule":
        """Return the same schedule without backwards and what they send: it runs wherever this one does.

        Example:
            >>> print(Schedule.parse(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]).forward_only())
            0: 0F0 0F1
            1: 1F0 1F1
        """
        kinds = (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)
        return replace(self, lists=tuple(tuple(one for one in actions if one.kind in kinds) for actions in self.lists))

    @explains_kinds
    def inputs(self, action: Action) -> tuple[Channel, ...]:
        """The channels (also those inside of a pipeline rank) whose data an F, B or I needs.

        >>> schedule = Schedule.parse(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])
        >>> [str(channel) for channel in schedule.inputs(Action.parse("1F0"))]
        ['0>1']
        """
        return self._inputs.get((action.stage, action.kind), ())

    @explains_kinds
    def outputs(self, action: Action) -> tuple[Channel, ...]:
        """The channels (also those inside of a pipeline rank) that carry what an F, B or I gives.

        >>> schedule = Schedule.parse(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])
        >>> [str(channel) for channel in schedule.outputs(Action.parse("1B0"))]
        ['1>0']
        """
        return self._outputs.get((action.stage, action.kind), ())

    def __str__(self) -> str:
        """A grid: a row per pipeline rank, its actions from left to right."""
        rows = [[f"{pipeline_rank}:", *map(str, actions)] for pipeline_rank, actions in enumerate(self.lists)]
        columns = [list(column) for column in zip_longest(*rows, fillvalue="")]
        widths = [max(map(len, column)) for column in columns]
        lines = (" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)
        return "\n".join(lines)


def relisted(schedule: Schedule, lists: Iterable[Sequence[Action]]) -> Schedule:
    """Do what ``with_lists`` does, for lists that are known to be right: a search makes hundreds of schedules."""
    other = object.__new__(Schedule)
    for name in Schedule.__slots__:
        object.__setattr__(other, name, getattr(schedule, name))
    object.__setattr__(other, "lists", tuple(tuple(actions) for actions in lists))
    return other


def _pipeline_ranks(lists: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    """Per stage, its pipeline rank."""
    found: dict[int, int] = {}
    for pipeline_rank, actions in enumerate(lists):
        if not actions:
            raise PlanError(
                f"pipeline rank {pipeline_rank} of the schedule has no actions; leave it out or give it a stage"
            )
        for action in actions:
            at = found.setdefault(action.stage, pipeline_rank)
            if at != pipeline_rank:
                raise PlanError(
                    f"stage {action.stage} of {action} is at pipeline ranks {at} and {pipeline_rank}; a stage has "
                    "one pipeline rank: move its actions into one list"
                )
    stages = len(found)
    missing = next((stage for stage in range(stages) if stage not in found), None)
    if missing is not None or not stages:
        raise PlanError(
            f"the schedule has no actions of stage {missing or 0}, and stages are counted from 0 without a gap; "
            "number the stages from 0"
        )
    return tuple(found[stage] for stage in range(stages))


def _channels_by_action(edges: Sequence[Edge], by_receiver: bool) -> _Channels:
    """The channels that an F, B or I reads, or those that it fills."""
    found: _Channels = {}
    for edge in edges:
        for channel, kinds in (
            (edge.forward, (Kind.FORWARD,)),
            (edge.backward, (Kind.BACKWARD, Kind.INPUT_GRADIENT)),
        ):
            for kind in kinds:
                key = channel.receiver if by_receiver else channel.sender, kind
                found[key] = (*found.get(key, ()), channel)
    return found


def _checked_edges(edges: tuple[Edge, ...], stages: int) -> tuple[Edge, ...]:
    for edge in edges:
        if not 0 <= edge.source < edge.destination < stages:
            raise PlanError(
                f"edge {edge} does not join an earlier stage to a later one of {stages}; write (source, destination) "
                "with source below destination"
            )
    return edges


def _checked_microbatches(schedule: Schedule) -> int:
    """How many there are; every stage computes each of them once."""
    kinds: dict[tuple[int, int], list[Kind]] = {}
    for action in schedule.actions():
        if action.is_compute:
            kinds.setdefault((action.stage, action.microbatch), []).append(action.kind)
    count = 1 + max((microbatch for _, microbatch in kinds), default=-1)
    whole, halves = {Kind.FORWARD, Kind.BACKWARD}, {Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT}
    has_backward = any(kind is not Kind.FORWARD for found in kinds.values() for kind in found)
    allowed = (whole, halves) if has_backward else ({Kind.FORWARD},)
    for stage in range(schedule.stages):
        for microbatch in range(count):
            found = kinds.get((stage, microbatch), [])
            if len(found) != len(set(found)) or set(found) not in allowed:
                names = " ".join(f"{stage}{kind}{microbatch}" for kind in found) or "nothing"
                raise PlanError(
                    f"stage {stage} does {names} for microbatch {microbatch}; each stage does F and B, or F, I and W, "
                    f"once for each of {count} microbatches, or all do F only"
                )
    return count
