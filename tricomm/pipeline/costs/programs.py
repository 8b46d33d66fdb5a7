"""What a simulation needs of a schedule's actions, worked out once for all schedules of one pipeline."""

from dataclasses import dataclass, field
from typing import NamedTuple

from tricomm.pipeline.costs.costs import Costs, TransferCost
from tricomm.pipeline.schedule.actions import Action, Channel
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.schedule import Schedule

Key = tuple[Channel, int]
"""The transfer of a microbatch on a channel. Within a simulation transfers and queues have numbers: see ``Known``."""


class Compute(NamedTuple):
    """A compute action as a simulation sees it: ``needs`` are the numbers of the transfers whose data it uses."""

    action: Action
    seconds: float
    needs: tuple[int, ...]


class Post(NamedTuple):
    """A send or receive as a simulation sees it: one end of a transfer, which has a number, comes to a queue."""

    number: int
    key: Key
    cost: TransferCost
    is_send: bool
    queue: int


Program = list[Compute | Post]
"""The list of a pipeline rank."""


@dataclass(slots=True)
class Known:
    """What simulations with the same costs, edges and queues have worked out: of each action, and of channels.

    Attributes:
        entries: by action.
        programs: by pipeline rank, the list that it had last and the entries of that.
        transfers: the number of each transfer.
        queues: the number of each queue, by its key; see ``Queues.key``.
        rates: of channels that share at one time.
        never_shared: see ``is_never_shared``; None is not worked out yet.
    """

    entries: dict[Action, Compute | Post] = field(default_factory=dict)
    programs: dict[int, tuple[tuple[Action, ...], Program]] = field(default_factory=dict)
    transfers: dict[Key, int] = field(default_factory=dict)
    queues: dict[tuple[int, ...], int] = field(default_factory=dict)
    rates: dict[tuple[Channel, ...], list[float]] = field(default_factory=dict)
    never_shared: bool | None = None

    def programs_of(self, schedule: Schedule, costs: Costs, queues: Queues) -> list[Program]:
        """Return the entries of each pipeline rank's list."""
        found: list[Program] = []
        for pipeline_rank, actions in enumerate(schedule.lists):
            last = self.programs.get(pipeline_rank)
            if last is None or last[0] is not actions:
                program = [self.entries.get(one) or self._entry(one, schedule, costs, queues) for one in actions]
                last = self.programs[pipeline_rank] = (actions, program)
            found.append(last[1])
        return found

    def is_never_shared(self, schedule: Schedule, costs: Costs, queues: Queues) -> bool:
        """Whether no two transfers that load one thing are ever on the wire at once: all that do stand in one queue."""
        if self.never_shared is None:
            self.never_shared = _is_never_shared(schedule, costs, queues)
        return self.never_shared

    def _entry(self, action: Action, schedule: Schedule, costs: Costs, queues: Queues) -> Compute | Post:
        found: Compute | Post
        if action.is_compute:
            needs = [one for one in schedule.inputs(action) if one in schedule.channels]
            numbers = tuple([self._number_of((channel, action.microbatch)) for channel in needs])
            found = Compute(action, costs.seconds(action), numbers)
        else:
            key = (action.channel, action.microbatch)
            queue = queues.key(schedule, action.channel, action.stage)
            number = self.queues.setdefault(queue, len(self.queues))
            cost = costs.transfer(action.channel)
            found = Post(self._number_of(key), key, cost, action.kind.is_send, number)
        self.entries[action] = found
        return found

    def _number_of(self, key: Key) -> int:
        return self.transfers.setdefault(key, len(self.transfers))


def _is_never_shared(schedule: Schedule, costs: Costs, queues: Queues) -> bool:
    common: dict[str, set[tuple[int, ...]]] = {}
    for channel in schedule.channels:
        ends = {queues.key(schedule, channel, stage) for stage in channel}
        for name, load in costs.transfer(channel).loads:
            if load > 1:  # even alone it has not its full speed
                return False
            common[name] = common.get(name, ends) & ends
    return all(common.values())
