"""The known schedules, as lists of forwards and backwards. Sends and receives come after: see communication.py.

F, B, I, W are the times of a stage, S is the number of stages, M that of microbatches, s a stage, c the time of a hop.
"""

from collections.abc import Iterable, Iterator, Sequence

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.pipeline.schedule.actions import MAX_COUNT, Action, Edge, Kind
from tricomm.pipeline.schedule.schedule import Schedule

Edges = Iterable[tuple[int, int]]

Delay = int | Sequence[int]
"""One number for all stages, or one for each."""


@checks_kinds
def gpipe(
    stages: int, microbatches: int, *, split: bool = False, weight_delay: Delay = 0, edges: Edges = ()
) -> Schedule:
    """All forwards, then all backwards; holds the activations of M microbatches (GPipe, Huang et al. 2019).

    Args and errors: as for eager_one_f_one_b.

    Example:
        >>> print(gpipe(2, 3))
        0: 0F0 0F1 0F2 0B0 0B1 0B2
        1: 1F0 1F1 1F2 1B0 1B1 1B2
    """
    return warmed_up(
        microbatches, (microbatches,) * _counted("stages", stages), split=split, weight_delay=weight_delay, edges=edges
    )


@checks_kinds
def one_f_one_b(
    stages: int, microbatches: int, *, split: bool = False, weight_delay: Delay = 0, edges: Edges = ()
) -> Schedule:
    """A backward as early as possible: S - s forwards, then one backward and one forward in turn (PipeDream-flush).

    Holds S - s activations, and hides no hop unless the backward is split.

    Args and errors: as for eager_one_f_one_b.

    Example:
        >>> print(one_f_one_b(2, 3))
        0: 0F0 0F1 0B0 0F2 0B1 0B2
        1: 1F0 1B0 1F1 1B1 1F2 1B2
    """
    return eager_one_f_one_b(stages, microbatches, depth=0, split=split, weight_delay=weight_delay, edges=edges)


@checks_kinds
def eager_one_f_one_b(
    stages: int,
    microbatches: int,
    *,
    depth: int = 1,
    split: bool = False,
    weight_delay: Delay = 0,
    edges: Edges = (),
) -> Schedule:
    """1F1B that starts with more forwards, so that hops hide behind compute (the paper's eager-1F1B is depth 1).

    Stage s warms up with (S - s) + depth (S - 1 - s) forwards and holds as many activations. Hops are then hidden, but
    for the fill and drain of the pipeline, up to c = (depth (F + B) + W) / 2, with W = 0 if the backward is not split.

    Args:
        stages: S; each has a pipeline rank of its own.
        microbatches: M; may be less than S.
        depth: 0 is 1F1B.
        split: backwards are I then W, and the gradient leaves after I.
        weight_delay: how many further I of its stage come before a W; one number, or one per stage.
        edges: which stages feed which; () is the chain.

    Raises:
        PlanError: counts that are not positive, or a delay without split.

    Example:
        >>> print(eager_one_f_one_b(2, 3, depth=1, split=True))
        0: 0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2
        1: 1F0 1I0 1W0 1F1 1I1 1W1 1F2 1I2 1W2
    """
    if depth < 0:
        raise PlanError(f"depth={depth} must be at least 0; 0 is 1F1B and 1 the eager 1F1B of the paper")
    count = _counted("stages", stages)
    warm_up = tuple(warm_up_of(stage, count, depth) for stage in range(count))
    return warmed_up(microbatches, warm_up, split=split, weight_delay=weight_delay, edges=edges)


@checks_kinds
def zero_bubble(stages: int, microbatches: int, *, depth: int = 0, edges: Edges = ()) -> Schedule:
    """Weight gradients wait until the pipeline would be idle (Qi et al. 2023): depth 0 is like their ZB-H1, 1 like H2.

    Stage s delays its weight gradients by (depth + 1) s microbatches, so every stage holds S + depth (S - 1)
    activations, and the bubble is (S - 1) (F + I - (depth + 1) W) where that is not negative.

    Raises:
        PlanError: counts that are not positive.

    Example:
        >>> print(zero_bubble(2, 3))
        0: 0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
        1: 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    count = _counted("stages", stages)
    delay = [(depth + 1) * stage for stage in range(count)]
    return eager_one_f_one_b(count, microbatches, depth=depth, split=True, weight_delay=delay, edges=edges)


@checks_kinds
def interleaved_one_f_one_b(
    pipeline_ranks: int, microbatches: int, *, stages_per_rank: int = 2, edges: Edges = ()
) -> Schedule:
    """1F1B in which pipeline rank p holds the stages p, p + P, p + 2 P ... (Narayanan et al. 2021), in Megatron's
    order.

    The bubble shrinks by ``stages_per_rank``, and as many times the hops must cross.

    Args:
        pipeline_ranks: P.
        microbatches: a multiple of ``pipeline_ranks``, or less than that.
        stages_per_rank: 1 gives the order of the eager 1F1B.
        edges: which stages feed which; () is the chain.

    Raises:
        PlanError: counts that are not positive or do not divide.

    Example:
        >>> print(interleaved_one_f_one_b(2, 2))
        0: 0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
        1: 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
    """
    count, rounds = _counted("pipeline_ranks", pipeline_ranks), _counted("stages_per_rank", stages_per_rank)
    group = min(count, _counted("microbatches", microbatches))
    if microbatches % group:
        raise PlanError(
            f"microbatches={microbatches} is above pipeline_ranks={pipeline_ranks} and no multiple of it; interleaving "
            "takes them in groups of one per pipeline rank: choose a multiple"
        )
    lists = []
    for pipeline_rank in range(count):
        order = [
            (turn, first + offset)
            for first in range(0, microbatches, group)
            for turn in range(rounds)
            for offset in range(group)
        ]
        forwards = [Action(pipeline_rank + turn * count, Kind.FORWARD, microbatch) for turn, microbatch in order]
        backwards = [
            Action(pipeline_rank + (rounds - 1 - turn) * count, Kind.BACKWARD, microbatch) for turn, microbatch in order
        ]
        warm_up = (rounds - 1) * group + 2 * (count - 1 - pipeline_rank) + 1
        lists.append(tuple(_alternating(forwards, backwards, warm_up)))
    return Schedule(tuple(lists), tuple(Edge(*edge) for edge in edges))


@checks_kinds
def warmed_up(
    microbatches: int,
    warm_up: Sequence[int],
    *,
    split: bool = False,
    weight_delay: Delay = 0,
    edges: Edges = (),
) -> Schedule:
    """Stage s does ``warm_up[s]`` forwards, then one backward and one forward in turn: the form of all of these.

    Args:
        microbatches: M; a warm-up above it is cut to it.
        warm_up: per stage, at least 1.
        split, weight_delay, edges: as for eager_one_f_one_b.

    Raises:
        PlanError: counts that are not positive, or a delay without split.

    Example:
        >>> print(warmed_up(3, [3, 1]))
        0: 0F0 0F1 0F2 0B0 0B1 0B2
        1: 1F0 1B0 1F1 1B1 1F2 1B2
    """
    count = _counted("microbatches", microbatches)
    delays = [weight_delay] * len(warm_up) if isinstance(weight_delay, int) else list(weight_delay)
    _counted("stages", len(warm_up))
    if len(delays) != len(warm_up) or min(delays) < 0:
        raise PlanError(
            f"weight_delay={weight_delay!r} must be a number from 0 or one for each of {len(warm_up)} stages"
        )
    if any(delays) and not split:
        raise PlanError(f"weight_delay={weight_delay!r} delays weight gradients of backwards; pass split=True")
    lists = []
    for stage, forwards in enumerate(warm_up):
        kind = Kind.INPUT_GRADIENT if split else Kind.BACKWARD
        order = _alternating(
            [Action(stage, Kind.FORWARD, microbatch) for microbatch in range(count)],
            [Action(stage, kind, microbatch) for microbatch in range(count)],
            _counted("warm_up", forwards),
        )
        lists.append(tuple(_with_weight_gradients(order, delays[stage])))
    return Schedule(tuple(lists), tuple(Edge(*edge) for edge in edges))


def warm_up_of(stage: int, stages: int, depth: int) -> int:
    """How many forwards come before the first backward of a stage, at some depth."""
    return (stages - stage) + depth * (stages - 1 - stage)


def _alternating(forwards: Sequence[Action], backwards: Sequence[Action], warm_up: int) -> Iterator[Action]:
    """So many forwards, then one backward and one forward in turn, then the backwards that remain."""
    begin = min(warm_up, len(forwards))
    yield from forwards[:begin]
    for index, backward in enumerate(backwards):
        yield backward
        yield from forwards[begin + index : begin + index + 1]


def _with_weight_gradients(order: Iterable[Action], delay: int) -> Iterator[Action]:
    """After each I, the W that is ``delay`` I behind it; those left over at the end."""
    waiting: list[Action] = []
    for action in order:
        yield action
        if action.kind is Kind.INPUT_GRADIENT:
            waiting.append(Action(action.stage, Kind.WEIGHT_GRADIENT, action.microbatch))
            if len(waiting) > delay:
                yield waiting.pop(0)
    yield from waiting


def _counted(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{name}={value!r} must be a whole number from 1")
    if value > MAX_COUNT:
        raise PlanError(f"{name}={value!r} is more than a schedule can list; give at most {MAX_COUNT}")
    return value
