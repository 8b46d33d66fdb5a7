"""Workload: the costs of a whole batch, from which follow those of a microbatch for any number of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite

from tricomm.errors import PlanError
from tricomm.kinds import checks_fields, checks_kinds
from tricomm.pipeline.costs.costs import Costs, StageCost, TransferCost
from tricomm.pipeline.schedule.actions import Channel


@checks_fields
@dataclass(frozen=True, slots=True)
class Workload:
    """What a batch costs, whatever it is split into.

    Attributes:
        stages: seconds and bytes of the whole batch.
        transfers: per channel, bytes and busy seconds of the whole batch; latency is that of each message.
        overhead_seconds: that each compute action takes however small its microbatch: launches, and kernels that are
            too small to fill the device.
        overheads: the same for each stage's F, I and W, beside that; () is none.

    Raises:
        PlanError: a negative overhead, or overheads of another number of stages.

    Example:
        >>> batch = Workload((StageCost(4.0, 4.0, 4.0),) * 2, overhead_seconds=0.1)
        >>> batch.costs(microbatches=8).stages[0].forward_seconds
        0.6
    """

    stages: tuple[StageCost, ...]
    transfers: Mapping[Channel, TransferCost] = field(default_factory=dict)
    overhead_seconds: float = 0.0
    overheads: tuple[StageCost, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise PlanError("stages is empty; give one StageCost per stage")
        if not (isfinite(self.overhead_seconds) and self.overhead_seconds >= 0):
            raise PlanError(
                f"overhead_seconds={self.overhead_seconds!r} must be a finite number from 0; give what an empty "
                "microbatch takes"
            )
        if self.overheads and len(self.overheads) != len(self.stages):
            raise PlanError(f"overheads are of {len(self.overheads)} stages of {len(self.stages)}; give one for each")

    @classmethod
    @checks_kinds
    def measured(cls, costs: Costs, microbatches: int, channels: tuple[Channel, ...] | None = None) -> "Workload":
        """From costs that were measured with one number of microbatches.

        What an action takes however small its microbatch is not known from one number, and counts as none: for other
        numbers of microbatches than a few times that, measure two and see ``fitted``.

        Args:
            costs: of one microbatch, as :class:`tricomm.pipeline.Measurement` gives them.
            microbatches: of the step in which they were.
            channels: that the stages use; None is those that the costs name.

        Example:
            >>> costs = Costs.uniform(2, 0.5, 0.5, 0.5)  # what Measurement found with 8 microbatches
            >>> Workload.measured(costs, microbatches=8).costs(16).stages[0].forward_seconds
            0.25
        """
        _check_microbatches(microbatches)
        if channels is None:
            channels = costs.channels
        stages = tuple(_scaled_stage(stage, microbatches) for stage in costs.stages)
        transfers = {channel: _scaled_transfer(costs.transfer(channel), microbatches) for channel in channels}
        return cls(stages, transfers)

    @classmethod
    @checks_kinds
    def fitted(cls, measured: Mapping[int, Costs]) -> "Workload":
        """From costs that were measured with several numbers of microbatches.

        Each action takes a fixed time and one that shrinks with its microbatch: for each stage and kind of action both
        are fitted to what was measured (least squares), none below 0. Hops are those of the fewest microbatches.

        >>> few, many = (Costs.uniform(2, 0.1 + 4 / m, 0.0, 0.0) for m in (2, 8))
        >>> batch = Workload.fitted({2: few, 8: many})
        >>> round(batch.costs(4).stages[0].forward_seconds, 6)  # 0.1 + 4 / 4
        1.1

        Args:
            measured: costs of one microbatch, by their number in the step, as Measurement gives them.

        Raises:
            PlanError: fewer than two numbers, or costs of different numbers of stages.
        """
        counts = sorted(measured)
        sizes = {len(costs.stages) for costs in measured.values()}
        if len(counts) < 2 or len(sizes) > 1:
            raise PlanError(
                f"measured has the numbers of microbatches {counts} and stages {sorted(sizes)}; give costs of one "
                "pipeline for two numbers of microbatches or more, or use Workload.measured"
            )
        few = measured[counts[0]]
        fits = [
            [_fitted(counts, [_seconds(measured[count].stages[stage])[kind] for count in counts]) for kind in range(3)]
            for stage in range(len(few.stages))
        ]
        stages = [
            StageCost(forward[0], inputs[0], weights[0], own.activation_nbytes * counts[0])
            for (forward, inputs, weights), own in zip(fits, few.stages, strict=True)
        ]
        overheads = [StageCost(forward[1], inputs[1], weights[1]) for forward, inputs, weights in fits]
        transfers = {channel: _scaled_transfer(few.transfer(channel), counts[0]) for channel in few.channels}
        return cls(tuple(stages), transfers, 0.0, tuple(overheads))

    @checks_kinds
    def costs(self, microbatches: int) -> Costs:
        """What one microbatch costs if the batch is split into so many.

        >>> batch = Workload((StageCost(8.0, 8.0, 8.0),) * 2, overhead_seconds=0.5)
        >>> [batch.costs(microbatches).stages[0].forward_seconds for microbatches in (4, 8, 16)]
        [2.5, 1.5, 1.0]
        """
        _check_microbatches(microbatches)
        fixed = self.overheads or (StageCost(0.0, 0.0, 0.0),) * len(self.stages)
        stages = tuple(
            _scaled_stage(stage, 1 / microbatches, *(self.overhead_seconds + one for one in _seconds(own)))
            for stage, own in zip(self.stages, fixed, strict=True)
        )
        transfers = {channel: _scaled_transfer(cost, 1 / microbatches) for channel, cost in self.transfers.items()}
        return Costs(stages, transfers)


def _check_microbatches(microbatches: int) -> None:
    if microbatches < 1:
        raise PlanError(f"microbatches={microbatches} must be at least 1; give the number in a step")


def _seconds(stage: StageCost) -> tuple[float, float, float]:
    """F, I and W."""
    return stage.forward_seconds, stage.input_gradient_seconds, stage.weight_gradient_seconds


def _fitted(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit (work, fixed) to seconds that are work / count + fixed; neither is negative."""
    parts = [1 / count for count in counts]
    mean_part, mean_seconds = sum(parts) / len(parts), sum(seconds) / len(seconds)
    spread = sum((part - mean_part) ** 2 for part in parts)
    slope = sum((part - mean_part) * one for part, one in zip(parts, seconds, strict=True)) / spread
    fixed = mean_seconds - slope * mean_part
    if slope < 0:
        return 0.0, mean_seconds
    if fixed < 0:
        return sum(part * one for part, one in zip(parts, seconds, strict=True)) / sum(part**2 for part in parts), 0.0
    return slope, fixed


def _scaled_stage(
    stage: StageCost, factor: float, forward: float = 0.0, inputs: float = 0.0, weights: float = 0.0
) -> StageCost:
    """The stage with all of it scaled, and some seconds more for F, I and W."""
    return StageCost(
        stage.forward_seconds * factor + forward,
        stage.input_gradient_seconds * factor + inputs,
        stage.weight_gradient_seconds * factor + weights,
        ceil(stage.activation_nbytes * factor),
    )


def _scaled_transfer(cost: TransferCost, factor: float) -> TransferCost:
    return TransferCost(cost.busy_seconds * factor, cost.latency_seconds, ceil(cost.nbytes * factor), cost.loads)
