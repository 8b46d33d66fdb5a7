"""The proof that a schedule runs: order, one send for each receive, and no ring of waiting ranks.

NCCL's rules are stricter than gloo's: a send ends only when its receive has been posted, and what one communicator
carries goes in order. A schedule that gloo runs may hang there. The proof builds the graph of who waits for whom and
looks for a cycle, which takes time linear in the number of actions.
"""

from collections.abc import Iterator
from enum import Enum

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds, explains_kinds, refuse_wrong_kinds
from tricomm.pipeline.schedule.actions import Action, Channel, Kind, receive, send
from tricomm.pipeline.schedule.schedule import Schedule


class Queues(Enum):
    """Which transfers run in the order in which they were posted, one after the other.

    Example:
        >>> [queues.name for queues in Queues if not queues.is_of_peers]  # those that the executor takes
        ['PER_CHANNEL', 'PER_DIRECTION']
    """

    PER_CHANNEL = "one per directed edge"
    """A communicator for each direction of each edge, as tricomm's executor has."""
    PER_DIRECTION = "one per pipeline rank and direction"
    """What a pipeline rank sends goes one after the other, and so does what it receives. Transfers to several
    neighbours, which would share a NIC, take turns on it, in an order that was planned: see ``in_turn``."""
    PER_PAIR = "one per pair of pipeline ranks"
    """Model of peers: both directions share one, as in torch's unbatched P2P on NCCL, which makes a communicator for
    each pair of ranks."""
    PER_PIPELINE_RANK = "one per pipeline rank"
    """Model of peers: all share one, as torch's P2P on an NCCL group that was made with ``device_id``, or batched."""
    PER_POSITION = PER_PIPELINE_RANK
    """The old name, kept for one version."""

    BLOCKING = "none, compute waiting for all"
    """Model of peers: what stands together in a list runs together, and the next computation waits until all of it has
    ended, as in Megatron's fused P2P, torch's Schedule1F1B, and frameworks that overlap nothing."""

    @property
    def is_of_peers(self) -> bool:
        """Whether only other systems have such queues: the simulator models them, the executor refuses them.

        >>> Queues.PER_CHANNEL.is_of_peers, Queues.PER_PAIR.is_of_peers
        (False, True)
        """
        return self not in (Queues.PER_CHANNEL, Queues.PER_DIRECTION)

    @explains_kinds
    def key(self, schedule: Schedule, channel: Channel, stage: int) -> tuple[int, ...]:
        """The queue, at the end of a channel that ``stage`` is, in which its transfers stand.

        >>> from tricomm.pipeline import Channel, gpipe
        >>> schedule, both = gpipe(2, 1), (Channel(0, 1), Channel(1, 0))
        >>> len({Queues.PER_PAIR.key(schedule, channel, stage=0) for channel in both})  # one for both directions
        1
        """
        if type(channel) is not Channel:
            refuse_wrong_kinds(Queues.key, channel=channel)
        here = schedule.pipeline_rank_of(stage)
        if self is Queues.PER_PIPELINE_RANK:
            return (here,)
        if self is Queues.PER_DIRECTION:
            return (here, int(stage == channel.receiver))
        if self in (Queues.PER_CHANNEL, Queues.BLOCKING):
            return (here, *channel)
        there = schedule.pipeline_rank_of(channel.receiver if stage == channel.sender else channel.sender)
        return (here, min(here, there), max(here, there))


SHOWN = 8
"""Of a long cycle, as many are named."""

Node = Action | tuple[Channel, int]
"""A compute action, or the transfer of a microbatch on a channel."""


@checks_kinds
def check(schedule: Schedule, queues: Queues = Queues.PER_CHANNEL) -> None:
    """Prove that a schedule runs to its end.

    Without sends and receives in it, only the order of its computation is proved.

    Args:
        schedule: with or without communication.
        queues: how transfers wait for each other.

    Raises:
        PlanError: the first action that breaks a rule, or the cycle of those that wait for each other.

    Example:
        >>> check(Schedule.parse(["0F0 0B0", "1F0 1B0"]))
        >>> check(Schedule.parse(["0B0 0F0", "1F0 1B0"]))
        Traceback (most recent call last):
            ...
        tricomm.errors.PlanError: 0B0 at pipeline rank 0 comes before 0F0, ...
    """
    _check_lists(schedule)
    if schedule.has_communication:
        _check_pairs(schedule)
        _check_channel_order(schedule)
    cycle = _cycle(waits(schedule, queues))
    if cycle:
        names = [_text(node) for node in cycle]
        if len(names) > SHOWN:
            names[SHOWN // 2 : -SHOWN // 2] = [f"{len(names) - SHOWN} others"]
        chain = ", which waits for ".join([*names, names[0]])
        can_run = schedule.has_communication and _cycle(waits(schedule.compute_only(), queues)) is None
        remedy = "reorder the actions"
        if can_run:
            remedy = "take a queue per directed edge (Queues.PER_CHANNEL), or put the receives elsewhere"
        raise PlanError(f"the schedule cannot run with queues {queues.value}: {chain}; {remedy}")


@checks_kinds
def receive_ring(schedule: Schedule, channel: Channel) -> int:
    """How many receive buffers a channel needs if they are used in turn.

    A buffer is taken where the receive stands and given back after the backward of its microbatch (B or W): until
    then the stage's graph may read its input. Without backwards it is given back after the forward.

    Example:
        >>> from tricomm.pipeline.schedule.communication import with_communication
        >>> from tricomm.pipeline.schedule.generators import gpipe
        >>> receive_ring(with_communication(gpipe(2, 3)), Channel(0, 1))
        3
    """
    pipeline_rank = schedule.pipeline_rank_of(channel.receiver)
    taken: list[int] = []
    given_back: list[int] = []
    last_use = {
        action.microbatch: index
        for index, action in enumerate(schedule.lists[pipeline_rank])
        if action.stage == channel.receiver and schedule.ends_microbatch(action)
    }
    for index, action in enumerate(schedule.lists[pipeline_rank]):
        if action.kind.is_receive and action.channel == channel:
            taken.append(index)
            given_back.append(last_use[action.microbatch])
    for size in range(1, len(taken)):
        if all(given_back[turn - size] < taken[turn] for turn in range(size, len(taken))):
            return size
    return len(taken)


def waits(schedule: Schedule, queues: Queues) -> dict[Node, list[Node]]:
    """Per action and transfer, those that must have ended before it begins.

    Compute actions of a pipeline rank run in order. A transfer begins when both pipeline ranks have come to it, which
    is after the compute action before it, and when the transfers before it in its queues have ended.
    """
    graph: dict[Node, list[Node]] = {}
    for actions in schedule.lists:
        before: Action | None = None
        tails: dict[tuple[int, ...], Node] = {}
        together: list[Node] = []
        for action in actions:
            if action.is_compute:
                graph.setdefault(action, []).extend(_needed(schedule, action))
                graph[action] += [before] if before else []
                graph[action] += together if queues is Queues.BLOCKING else []
                before, together = action, []
                continue
            node = (action.channel, action.microbatch)
            queue = queues.key(schedule, action.channel, action.stage)
            waiting = graph.setdefault(node, [])
            waiting += [before] if before else []
            waiting += [tails[queue]] if queue in tails else []
            tails[queue] = node
            together.append(node)
    return graph


def _needed(schedule: Schedule, action: Action) -> Iterator[Node]:
    """The transfers, or the actions of this pipeline rank, whose data a compute action needs."""
    for channel in schedule.inputs(action):
        if schedule.has_communication and channel in schedule.channels:
            yield channel, action.microbatch
        else:
            yield schedule.producer(channel, action.microbatch)


def _check_lists(schedule: Schedule) -> None:
    """Within each list: F before B or I, I before W, producer before send, receive before consumer."""
    for pipeline_rank, actions in enumerate(schedule.lists):
        seen: set[Action] = set()
        for action in actions:
            for earlier, why in _must_precede(schedule, action):
                if earlier not in seen:
                    raise PlanError(
                        f"{action} at pipeline rank {pipeline_rank} comes before {earlier}, but {why}; "
                        f"put {earlier} before {action} in the list"
                    )
            if action in seen:
                raise PlanError(
                    f"{action} stands twice at pipeline rank {pipeline_rank}; each action is done once: drop one"
                )
            seen.add(action)


def _must_precede(schedule: Schedule, action: Action) -> Iterator[tuple[Action, str]]:
    stage, microbatch = action.stage, action.microbatch
    if action.kind.gives_gradient:
        yield Action(stage, Kind.FORWARD, microbatch), "a backward needs its forward"
    if action.kind is Kind.WEIGHT_GRADIENT:
        yield Action(stage, Kind.INPUT_GRADIENT, microbatch), "the gradient of weights follows that of inputs"
    if action.kind.is_send and action.channel in schedule.channels:
        yield schedule.producer(action.channel, microbatch), "what is sent must have been computed"
    for channel in schedule.inputs(action):
        if channel not in schedule.channels:
            yield schedule.producer(channel, microbatch), "its result is an input, and both are at this pipeline rank"
        elif schedule.has_communication:
            yield receive(channel, microbatch), "what is received is an input"


def _check_pairs(schedule: Schedule) -> None:
    """Each channel sends each microbatch once, and nothing else is sent or received."""
    found = {action for action in schedule.actions() if not action.is_compute}
    expected = {
        make(channel, microbatch)
        for channel in schedule.channels
        for microbatch in range(schedule.microbatches)
        for make in (send, receive)
    }
    for pipeline_rank, actions in enumerate(schedule.lists):
        for action in actions:
            if not action.is_compute and action not in expected:
                edges = ", ".join(map(str, schedule.edges))
                raise PlanError(
                    f"{action} at pipeline rank {pipeline_rank} uses an edge that needs no communication or does not "
                    f"exist; the edges are {edges}: drop it or add its edge"
                )
    missing = sorted(map(str, expected - found))
    if missing:
        raise PlanError(
            f"{missing[0]} is missing, so what is at its other end would wait for ever; each edge between pipeline "
            "ranks sends and receives each microbatch once in each direction: call with_communication"
        )


def _check_channel_order(schedule: Schedule) -> None:
    """Both ends of a channel take the microbatches in one order."""
    for channel in schedule.channels:
        ends: list[list[int]] = []
        for stage, is_send in ((channel.sender, True), (channel.receiver, False)):
            actions = schedule.lists[schedule.pipeline_rank_of(stage)]
            ends.append(
                [
                    action.microbatch
                    for action in actions
                    if not action.is_compute and action.kind.is_send == is_send and action.channel == channel
                ]
            )
        if ends[0] != ends[1]:
            turn = next(turn for turn, pair in enumerate(zip(*ends, strict=True)) if pair[0] != pair[1])
            raise PlanError(
                f"channel {channel} carries {send(channel, ends[0][turn])} when {receive(channel, ends[1][turn])} is "
                "due; a channel delivers in the order in which it sends: call with_communication, or reorder one side"
            )


def _cycle(graph: dict[Node, list[Node]]) -> list[Node] | None:
    """Some cycle of nodes, each of which waits for the next; None if there is none."""
    finished: set[Node] = set()
    for root, needs in graph.items():
        if root in finished:
            continue
        path, left = [root], {root: iter(needs)}
        while path:
            following = next((node for node in left[path[-1]] if node not in finished), None)
            if following is None:
                finished.add(path[-1])
                del left[path.pop()]
            elif following in left:
                return path[path.index(following) :]
            else:
                path.append(following)
                left[following] = iter(graph[following])
    return None


def _text(node: Node) -> str:
    if isinstance(node, Action):
        return str(node)
    return f"{send(*node)}/{receive(*node)}"
