"""Costs: the seconds and bytes of a pipeline's stages and hops, measured or planned."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import Any

from tricomm.errors import PlanError
from tricomm.kinds import checks_fields, checks_kinds, explains_fields, explains_kinds, refuse_wrong_kinds
from tricomm.layout.topology import Topology
from tricomm.pipeline.schedule.actions import MAX_STAGES, Action, Channel, Kind
from tricomm.plan import Plan

Load = tuple[str, float]
"""(what transfers share, the part of it that a transfer takes when it has it alone)."""


@checks_fields
@dataclass(frozen=True, slots=True)
class StageCost:
    """What one microbatch costs a stage.

    Attributes:
        forward_seconds, input_gradient_seconds, weight_gradient_seconds: F, I and W; B is I + W.
        activation_nbytes: held from the begin of F to the end of B or W, without what arrived over an edge.

    Raises:
        PlanError: a number that is negative or not finite.

    Example:
        >>> cost = StageCost(1.0, 1.5, 0.5, activation_nbytes=1 << 20)
        >>> cost.backward_seconds, cost.total_seconds
        (2.0, 3.0)
    """

    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    activation_nbytes: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self)

    @explains_kinds
    def seconds(self, action: Action) -> float:
        """How long an action computes.

        >>> StageCost(1.0, 1.5, 0.5).seconds(Action.parse("0B3"))
        2.0
        """
        if action.kind is Kind.FORWARD:
            return self.forward_seconds
        if action.kind is Kind.INPUT_GRADIENT:
            return self.input_gradient_seconds
        if action.kind is Kind.WEIGHT_GRADIENT:
            return self.weight_gradient_seconds
        return self.backward_seconds

    @property
    def backward_seconds(self) -> float:
        """The whole backward, B.

        >>> StageCost(1.0, 1.5, 0.5).backward_seconds
        2.0
        """
        return self.input_gradient_seconds + self.weight_gradient_seconds

    @property
    def total_seconds(self) -> float:
        """F + B.

        >>> StageCost(1.0, 1.5, 0.5).total_seconds
        3.0
        """
        return self.forward_seconds + self.backward_seconds


@checks_fields
@dataclass(frozen=True, slots=True)
class TransferCost:
    """What one microbatch costs in one direction of an edge.

    Attributes:
        busy_seconds: for which it occupies its channel, if it shares nothing.
        latency_seconds: from its last byte on the wire to its use; others may use the wire meanwhile.
        nbytes: of the buffer that a pipeline rank needs for it: at the sender while it is sent, at the receiver from
            the post of the receive to the end of the backward.
        loads: shared resources that it uses, such as ``("NIC 0 out", 1.0)``. Transfers whose parts add up to more
            than 1 slow each other down.

    Raises:
        PlanError: a number that is negative or not finite.

    Example:
        >>> hop = TransferCost.of_bytes(1_000_000, bytes_per_second=1e9, latency_seconds=1e-4)
        >>> hop.busy_seconds, hop.seconds
        (0.001, 0.0011)
        >>> hop.sharing("NIC 0", "NIC 1").loads
        (('NIC 0 out', 1.0), ('NIC 1 in', 1.0))
    """

    busy_seconds: float = 0.0
    latency_seconds: float = 0.0
    nbytes: int = 0
    loads: tuple[Load, ...] = ()

    def __post_init__(self) -> None:
        _check_numbers(self)

    @classmethod
    @checks_kinds
    def of_bytes(cls, nbytes: int, bytes_per_second: float, latency_seconds: float = 0.0) -> "TransferCost":
        """One message over one link.

        >>> TransferCost.of_bytes(8 << 20, bytes_per_second=12.5e9, latency_seconds=2e-5)
        TransferCost(busy_seconds=0.00067108864, latency_seconds=2e-05, nbytes=8388608, loads=())
        """
        if bytes_per_second <= 0:
            raise PlanError(f"bytes_per_second={bytes_per_second!r} must be above 0; give the rate of the link")
        return cls(nbytes / bytes_per_second, latency_seconds, nbytes)

    @classmethod
    @checks_kinds
    def of_plan(cls, plan: Plan, topology: Topology | None = None) -> "TransferCost":
        """A reshard, as its plan is simulated; it loads each NIC with what it sends and receives there.

        Args:
            plan: of all ranks.
            topology: hosts and rates; the plan's own if None.

        Example:
            >>> from tricomm import Mesh, ShardingSpec, Topology, make_plan
            >>> one, two = (ShardingSpec.from_dims(Mesh([rank], ("x",)), ["R"], (8,), "float32") for rank in (0, 1))
            >>> hosts = Topology(["a", "b"], nic_bytes_per_second=16.0, latency_seconds=0.0)
            >>> hop = TransferCost.of_plan(make_plan(one, two), hosts)
            >>> round(hop.seconds, 3), hop.nbytes
            (2.0, 32)
        """
        topology = topology or plan.topology
        seconds = plan.simulated_seconds(topology)
        received: Counter[int] = Counter()
        for item in plan.items:
            for rank in item.destination.mesh.ranks:
                received[rank] += prod(item.destination.local_shape(rank)) * item.destination.itemsize
        nbytes = max(received.values())
        loads = {name: min(1.0, busy / seconds) for name, busy in _nic_seconds(plan, topology).items()}
        return cls(seconds, 0.0, nbytes, tuple(sorted(loads.items())))

    @classmethod
    @checks_kinds
    def in_turn(cls, costs: Sequence["TransferCost"]) -> "TransferCost":
        """Several transfers, one after the other: the tensors of one edge.

        >>> hidden, mask = TransferCost(0.25, nbytes=1024), TransferCost(0.125, nbytes=256)
        >>> TransferCost.in_turn([hidden, mask]).seconds
        0.375
        """
        busy = sum(cost.busy_seconds for cost in costs)
        loads: dict[str, float] = {}
        for cost in costs:
            for name, load in cost.loads:
                loads[name] = loads.get(name, 0.0) + load * cost.busy_seconds / busy
        latency = max((cost.latency_seconds for cost in costs), default=0.0)
        return cls(busy, latency, sum(cost.nbytes for cost in costs), tuple(sorted(loads.items())))

    @property
    def seconds(self) -> float:
        """From its start to its arrival, if it shares nothing.

        >>> TransferCost(busy_seconds=0.5, latency_seconds=0.25).seconds
        0.75
        """
        return self.busy_seconds + self.latency_seconds

    @checks_kinds
    def sharing(self, sender: str, receiver: str, *, full_duplex: bool = True) -> "TransferCost":
        """The same transfer through the whole of two named NICs.

        Args:
            sender, receiver: any names; transfers that name the same NIC share it.
            full_duplex: whether a NIC sends and receives at its full rate at once.

        Example:
            >>> TransferCost(0.5).sharing("node 0", "node 1", full_duplex=False).loads
            (('node 0', 1.0), ('node 1', 1.0))
        """
        directions = (f"{sender} out", f"{receiver} in") if full_duplex else (sender, receiver)
        return replace(self, loads=tuple((name, 1.0) for name in dict.fromkeys(directions)))


@explains_fields
@dataclass(frozen=True, slots=True)
class Costs:
    """What a pipeline costs.

    Attributes:
        stages: one cost per stage.
        transfers: a mapping of channels, which is kept as sorted pairs; channels that are left out cost ``other``.
        other: the transfers of all other channels.

    Raises:
        PlanError: no stages, or a channel that is not between two.

    Example:
        >>> costs = Costs.uniform(4, 1.0, 1.0, 1.0, hop=0.5)
        >>> len(costs.stages), costs.transfer(Channel(0, 1)).busy_seconds
        (4, 0.5)
    """

    stages: tuple[StageCost, ...]
    transfers: Mapping[Channel, TransferCost] | tuple[tuple[Channel, TransferCost], ...] = ()
    other: TransferCost = field(default_factory=TransferCost)
    _by_channel: dict[Channel, TransferCost] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.transfers, Mapping):
            object.__setattr__(self, "transfers", tuple((_channel(one), cost) for one, cost in self.transfers.items()))
        refuse_wrong_kinds(Costs.__init__, stages=self.stages, transfers=self.transfers, other=self.other)
        by_channel: dict[Channel, TransferCost] = dict(self.transfers)  # of pairs: a mapping was made into them
        for channel in by_channel:
            if channel.sender == channel.receiver or min(channel.sender, channel.receiver) < 0:
                raise PlanError(
                    f"transfers has a cost of {channel!r}, which is no channel between two stages; write "
                    "Channel(sender, receiver) for each direction of an edge"
                )
        if not self.stages:
            raise PlanError("stages is empty; give one StageCost per stage")
        if not any(stage.total_seconds for stage in self.stages):
            raise PlanError("no stage takes any time, and there is nothing to schedule; give the seconds of F, I and W")
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "transfers", tuple(sorted(by_channel.items(), key=lambda item: item[0])))
        object.__setattr__(self, "_by_channel", by_channel)

    @classmethod
    @checks_kinds
    def uniform(
        cls,
        stages: int,
        forward_seconds: float,
        input_gradient_seconds: float,
        weight_gradient_seconds: float,
        hop: TransferCost | float = 0.0,
    ) -> "Costs":
        """All stages alike, and all hops alike; a hop given in seconds occupies its channel for them.

        >>> Costs.uniform(4, 1.0, 1.0, 0.5, hop=0.25).stages[3].backward_seconds
        1.5
        """
        if stages > MAX_STAGES:
            raise PlanError(f"stages={stages} is more than {MAX_STAGES}; give the stages of one pipeline")
        stage = StageCost(forward_seconds, input_gradient_seconds, weight_gradient_seconds)
        return cls((stage,) * stages, (), hop if isinstance(hop, TransferCost) else TransferCost(hop))

    @explains_kinds
    def seconds(self, action: Action) -> float:
        """How long a compute action takes.

        >>> Costs((StageCost(1.0, 1.0, 1.0), StageCost(2.0, 2.0, 2.0))).seconds(Action.parse("1F0"))
        2.0
        """
        if action.stage >= len(self.stages):
            raise PlanError(
                f"{action} is of a stage without costs, of which there are {len(self.stages)}; give every stage its own"
            )
        return self.stages[action.stage].seconds(action)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Those that have a cost of their own.

        >>> Costs.uniform(2, 1, 1, 1).with_transfers([Channel(0, 1)], TransferCost(0.5)).channels
        (Channel(sender=0, receiver=1),)
        """
        return tuple(self._by_channel)

    def all_transfers(self) -> tuple[TransferCost, ...]:
        """The costs of all channels that are named, and of the others.

        >>> costs = Costs.uniform(2, 1, 1, 1, hop=0.25).with_transfers([Channel(0, 1)], TransferCost(0.5))
        >>> [transfer.seconds for transfer in costs.all_transfers()]
        [0.5, 0.25]
        """
        return (*self._by_channel.values(), self.other)

    @explains_kinds
    def transfer(self, channel: Channel) -> TransferCost:
        """What a microbatch costs on a channel.

        >>> costs = Costs.uniform(2, 1, 1, 1, hop=0.25).with_transfers([Channel(0, 1)], TransferCost(0.5))
        >>> costs.transfer(Channel(0, 1)).seconds, costs.transfer(Channel(1, 0)).seconds
        (0.5, 0.25)
        """
        if type(channel) is not Channel:  # asked very often, and any key would find the cost of the others
            refuse_wrong_kinds(Costs.transfer, channel=channel)
        return self._by_channel.get(channel, self.other)

    @property
    def shares_anything(self) -> bool:
        """Whether transfers of different channels may slow each other down.

        >>> one, other = TransferCost(0.5).sharing("a", "b"), TransferCost(0.5).sharing("a", "c")
        >>> Costs((StageCost(1, 1, 1),) * 3, {Channel(0, 1): one, Channel(0, 2): other}).shares_anything  # NIC a
        True
        """
        names = [name for one in self.all_transfers() for name, _ in one.loads]
        return len(names) > len(set(names)) or bool(self.other.loads)

    def without_transfers(self) -> "Costs":
        """The same stages with hops that cost nothing: the yardstick for what is exposed.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> costs, schedule = Costs.uniform(2, 1, 1, 1, hop=0.5), gpipe(2, 4)
        >>> [simulate(schedule, one).makespan_seconds for one in (costs, costs.without_transfers())]
        [16.0, 15.0]
        """
        return Costs(self.stages)

    @checks_kinds
    def with_transfers(self, channels: Iterable[Channel], cost: TransferCost) -> "Costs":
        """The same costs, but for some channels.

        >>> costs = Costs.uniform(3, 1, 1, 1, hop=0.25)
        >>> slow = costs.with_transfers([Channel(1, 2), Channel(2, 1)], TransferCost(1.0))  # between two hosts
        >>> slow.transfer(Channel(1, 2)).seconds, slow.transfer(Channel(0, 1)).seconds
        (1.0, 0.25)
        """
        return replace(self, transfers={**self._by_channel, **dict.fromkeys(channels, cost)})


def _channel(given: Any) -> Any:
    """Return a plain pair of stages as a Channel, and all else as it is."""
    return Channel(*given) if type(given) is tuple and len(given) == 2 else given


def _nic_seconds(plan: Plan, topology: Topology) -> dict[str, float]:
    """For how long each NIC that the plan uses is busy, by direction."""
    directions = zip(("out", "in"), plan.nic_seconds(topology), strict=True)
    return {
        f"NIC {nic} {direction}": seconds
        for direction, busy in directions
        for nic, seconds in enumerate(busy.tolist())
        if seconds
    }


def _check_numbers(cost: StageCost | TransferCost) -> None:
    for name in type(cost).__dataclass_fields__:
        value = getattr(cost, name)
        if isinstance(value, (int, float)) and not (isfinite(value) and value >= 0):
            raise PlanError(f"{name}={value!r} must be a finite number from 0; measure it in the unit of its name")
