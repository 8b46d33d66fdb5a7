"""How the channels of a chosen schedule fare: hidden, or exposed, and then why and what would help."""

from dataclasses import dataclass

from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.actions import Channel

EXPOSED = 0.01
"""A channel that adds less than this part of the makespan counts as hidden."""


@dataclass(frozen=True, slots=True)
class ExposureReport:
    """How a channel fares in the chosen schedule.

    Attributes:
        hop_seconds: mean time of a transfer, with what it shares.
        exposed_seconds: by which it lengthens the critical path beyond one fill or drain.
        reason: why, and what would help; "" if it is hidden.
    """

    channel: Channel
    hop_seconds: float
    exposed_seconds: float
    reason: str


def exposure_of(channel: Channel, timeline: Timeline, depth: int | None, is_limited: bool) -> ExposureReport:
    """Of one channel.

    Args:
        channel: which.
        timeline: of the schedule that was chosen.
        depth: of its warm-up; None if it has no regular one.
        is_limited: whether a faster schedule did not fit the limits.
    """
    hop = timeline.hop_seconds()[channel]
    exposed = max(0.0, timeline.critical_seconds()[channel] - hop)
    is_hidden = exposed <= EXPOSED * timeline.makespan_seconds
    return ExposureReport(
        channel, hop, exposed, "" if is_hidden else _reason(channel, timeline, hop, depth, is_limited)
    )


def _reason(channel: Channel, timeline: Timeline, hop: float, depth: int | None, is_limited: bool) -> str:
    stages, alone = timeline.costs.stages, timeline.costs.transfer(channel)
    slowest = max(stage.total_seconds for stage in stages)
    fullest, busy = _fullest(channel, timeline)
    if alone.busy_seconds > slowest:
        return (
            f"a transfer keeps its link for {alone.busy_seconds:.6g} s and the slowest stage computes "
            f"{slowest:.6g} s a microbatch, so no schedule hides it; send fewer bytes, or plan the hop better"
        )
    if busy > slowest * (1 - EXPOSED):
        return (
            f"the transfers of a microbatch keep {fullest} for {busy:.6g} s and the slowest stage computes "
            f"{slowest:.6g} s, so the NIC sets the pace; use more NICs or fewer bytes"
        )
    if hop > alone.seconds * (1 + EXPOSED):
        return f"it shares a NIC and takes {hop:.6g} s instead of {alone.seconds:.6g} s; use more NICs or fewer bytes"
    if is_limited:
        return f"a hop of {hop:.6g} s wants a warm-up that the memory limit has no room for; raise the limit"
    if depth is None:
        return f"a hop of {hop:.6g} s is waited for; a deeper warm-up was no faster"
    weights = min(stage.weight_gradient_seconds for stage in stages) if timeline.schedule.is_split else 0.0
    hides = (depth * min(stage.total_seconds for stage in stages) + weights) / 2
    reason = f"depth {depth} hides {hides:.6g} s of a hop in a steady state, "
    if hop > hides:
        return reason + f"and it takes {hop:.6g} s; a deeper warm-up was no faster"
    microbatches = timeline.schedule.microbatches
    return reason + f"and would hide {hop:.6g} s, but {microbatches} microbatches hardly reach one; use more"


def _fullest(channel: Channel, timeline: Timeline) -> tuple[str, float]:
    """Of what a channel shares with others: the fullest, and for how long a microbatch keeps it; ("", 0) if nothing."""
    busy: dict[str, float] = {}
    for one in timeline.schedule.channels:
        cost = timeline.costs.transfer(one)
        for name, load in cost.loads:
            busy[name] = busy.get(name, 0.0) + load * cost.busy_seconds
    shared = [(busy[name], name) for name, _ in timeline.costs.transfer(channel).loads]
    seconds, name = max(shared, default=(0.0, ""))
    return name, seconds
