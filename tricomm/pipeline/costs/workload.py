"""Workload: the costs of a whole batch, from which follow those of a microbatch for any number of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from tricomm.errors import PlanError
from tricomm.pipeline.costs.costs import Costs, StageCost, TransferCost
from tricomm.pipeline.schedule.actions import Channel


@dataclass(frozen=True, slots=True)
class Workload:
    """What a batch costs, whatever it is split into.

    Attributes:
        stages: seconds and bytes of the whole batch.
        transfers: per channel, bytes and busy seconds of the whole batch; latency is that of each message.
        overhead_seconds: that each compute action takes however small its microbatch: launches, and kernels that are
            too small to fill the device.

    Raises:
        PlanError: a negative overhead.

    >>> batch = Workload((StageCost(4.0, 4.0, 4.0),) * 2, overhead_seconds=0.1)
    >>> batch.costs(microbatches=8).stages[0].forward_seconds
    0.6
    """

    stages: tuple[StageCost, ...]
    transfers: Mapping[Channel, TransferCost] = field(default_factory=dict)
    overhead_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.overhead_seconds >= 0:
            raise PlanError(
                f"overhead_seconds={self.overhead_seconds!r} must be at least 0; it is what an empty microbatch takes"
            )

    @classmethod
    def measured(cls, costs: Costs, microbatches: int, channels: tuple[Channel, ...] | None = None) -> "Workload":
        """From costs that were measured with some number of microbatches.

        Args:
            costs: of one microbatch, as :class:`tricomm.pipeline.Measurement` gives them.
            microbatches: of the step in which they were.
            channels: that the stages use; None is those that the costs name.
        """
        if channels is None:
            channels = costs.channels
        stages = tuple(_scaled_stage(stage, microbatches, 0.0) for stage in costs.stages)
        transfers = {channel: _scaled_transfer(costs.transfer(channel), microbatches) for channel in channels}
        return cls(stages, transfers)

    def costs(self, microbatches: int) -> Costs:
        """What one microbatch costs if the batch is split into so many."""
        if microbatches < 1:
            raise PlanError(f"microbatches={microbatches} must be a number from 1")
        stages = tuple(_scaled_stage(stage, 1 / microbatches, self.overhead_seconds) for stage in self.stages)
        transfers = {channel: _scaled_transfer(cost, 1 / microbatches) for channel, cost in self.transfers.items()}
        return Costs(stages, transfers)


def _scaled_stage(stage: StageCost, factor: float, overhead: float) -> StageCost:
    return StageCost(
        stage.forward_seconds * factor + overhead,
        stage.input_gradient_seconds * factor + overhead,
        stage.weight_gradient_seconds * factor + overhead,
        ceil(stage.activation_nbytes * factor),
    )


def _scaled_transfer(cost: TransferCost, factor: float) -> TransferCost:
    return TransferCost(cost.busy_seconds * factor, cost.latency_seconds, ceil(cost.nbytes * factor), cost.loads)
