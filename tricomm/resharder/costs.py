"""What the calls of a Resharder, or of one selection of its tensors, have cost this rank."""

import torch

from tricomm.packing.selection import Planned
from tricomm.stats import Stats, Traffic
from tricomm.transport.memory.rungs import PairTransports, Rung
from tricomm.transport.runtime import PlanExecution


def stats_of(
    execution: PlanExecution | None,
    planned: Planned,
    rank: int,
    plan_seconds: float,
    device: torch.device,
    transports: PairTransports,
) -> Stats:
    """Sum up the runs of a plan on this rank.

    Args:
        execution: of the plan; None off the meshes.
        planned: the plan, or a selection of it.
        rank: this one.
        plan_seconds: that planning took.
        device: of the tensors.
        transports: how bytes go; empty before the ranks have met.
    """
    if execution is None:
        return Stats(plan_seconds=plan_seconds)
    tally = execution.tally.settled()
    sent = Traffic(
        transport=_names_of(execution, device, transports),
        messages=tally.messages,
        nbytes=tally.nbytes,
        wait_seconds=tally.wait_seconds,
    )
    needed = sum(stack.missing_nbytes(rank) for stacks in planned.stacks for stack in stacks)
    return Stats(
        calls=tally.calls,
        tensors=tally.calls * _tensors_here(planned, rank),
        messages=tally.messages,
        nbytes=tally.nbytes,
        received_messages=tally.received_messages,
        received_nbytes=tally.received_nbytes,
        minimum_nbytes=tally.calls * needed,
        staging_nbytes=tally.staging_nbytes,
        plan_seconds=plan_seconds + tally.bind_seconds,
        pack_seconds=tally.pack_seconds,
        post_seconds=tally.post_seconds,
        wait_seconds=tally.wait_seconds,
        unpack_seconds=tally.unpack_seconds,
        transports=(sent,) if tally.messages or tally.received_messages else (),
    )


def _names_of(execution: PlanExecution, device: torch.device, transports: PairTransports) -> str:
    """What carries the bytes: the network's backend, memory, or both."""
    network = "gloo" if device.type == "cpu" else "nccl"
    over = {transports[pair].rung is Rung.NETWORK for pair in execution.pairs} if transports else {True}
    return network if over == {True} else "memory" if over == {False} else f"{network} and memory"


def _tensors_here(planned: Planned, rank: int) -> int:
    """How many tensors this rank needs, or if none, holds."""
    ends = planned.ends
    needed, held = (sum(rank in one.spec.mesh for one in side) for side in (ends.destinations, ends.sources))
    return needed or held
