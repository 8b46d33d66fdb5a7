"""All ranks in one process, on one thread: the specification of the real transports.

Nothing is forgiven here that a real network might not forgive. A send is done only when its receive has been posted
and the bytes have been copied; what goes to several ranks in one call crosses only when all have come to it. Bytes are
copied as late as possible, when no rank can go on, so a buffer that is reused too early shows. With ``grouped`` (as on
an NCCL stream) a rank's operations of one round start together, and only when all those of its earlier rounds are done.
With ``reads`` (as between ranks of one host) bytes move only when the receiving rank waits for them, however late that
is.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from operator import index
from typing import Any

import torch

from tricomm.errors import ArgumentError, SpecError, TransportError
from tricomm.kinds import checks_fields, explains_missing
from tricomm.packing.runs import NOTHING_IN_PLACE
from tricomm.packing.selection import Planned, Selection
from tricomm.packing.staging import Direction
from tricomm.packing.tensor_checker import Given, TensorChecker
from tricomm.plan import Plan
from tricomm.stats import Traffic
from tricomm.transport.base import NO_ARENAS, Asked, Operation, Shared
from tricomm.transport.moving.kept import StagingProvider
from tricomm.transport.runtime import PlanExecution


class LocalWork:
    """An operation of one rank that the network completes."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.done = False

    @property
    def peer(self) -> int:
        """The other rank."""
        return self.operation.peer


class LocalNetwork:
    """Mailboxes between ranks: first in, first out per ordered pair.

    Args:
        grouped: whether a rank's groups run one after the other.
        depth: what every endpoint asks for: (receives ahead, rounds open).
        reads: whether a receiver copies only what it waits for.
    """

    def __init__(self, grouped: bool, depth: tuple[int, int], reads: bool = False) -> None:
        self.grouped = grouped
        self.reads = reads
        self.depth = depth
        self.queues: dict[int, deque[list[LocalWork]]] = {}
        self.traffic: dict[tuple[int, int], Traffic] = {}

    def deliver(self, awaited: Collection[LocalWork | None]) -> bool:
        """Complete every pair of operations that may run now; False if there is none.

        Args:
            awaited: what each rank waits for.
        """
        sends: dict[tuple[int, int], deque[LocalWork]] = {}
        receives: dict[tuple[int, int], deque[LocalWork]] = {}
        for rank, queue in self.queues.items():
            for group in [queue[0]] if self.grouped and queue else queue:
                for work in group:
                    if work.done:
                        continue
                    peer = work.peer
                    if work.operation.is_send:
                        sends.setdefault((rank, peer), deque()).append(work)
                    else:
                        receives.setdefault((peer, rank), deque()).append(work)
        moved = False
        come = {(work.operation.group, pair[1]) for pair, works in receives.items() for work in works}
        for pair in sends.keys() & receives.keys():
            for send, receive in zip(sends[pair], receives[pair], strict=False):
                together = send.operation.group
                if receive in awaited if self.reads else all((together, rank) in come for rank in together[1:]):
                    self._copy(pair, send, receive)
                    moved = True
        for queue in self.queues.values():
            while queue and all(work.done for work in queue[0]):
                queue.popleft()
        return moved

    def _copy(self, pair: tuple[int, int], send: LocalWork, receive: LocalWork) -> None:
        nbytes = send.operation.buffer.numel()
        if nbytes != receive.operation.buffer.numel():
            raise TransportError(
                f"rank {pair[0]} sends {nbytes} bytes where rank {pair[1]} expects "
                f"{receive.operation.buffer.numel()}; the ranks do not follow the same plan"
            )
        receive.operation.buffer.copy_(send.operation.buffer)
        send.done = receive.done = True
        before = self.traffic.get(pair, Traffic(transport="local"))
        self.traffic[pair] = replace(before, messages=before.messages + 1, nbytes=before.nbytes + nbytes)


class LocalEndpoint:
    """One rank's end of a LocalNetwork."""

    in_place = NOTHING_IN_PLACE
    arenas = NO_ARENAS

    def __init__(self, network: LocalNetwork, rank: int) -> None:
        self.network = network
        self.rank = rank
        self.queue: deque[list[LocalWork]] = network.queues.setdefault(rank, deque())

    @property
    def depth(self) -> tuple[int, int]:
        """See Transport."""
        return self.network.depth

    @staticmethod
    def reserve(nbytes: Mapping[Direction, int]) -> Mapping[Direction, torch.Tensor]:
        """See Transport."""
        return {}

    @staticmethod
    def share(asked: Asked) -> Shared:
        """See Transport."""
        raise NotImplementedError

    def post(self, operations: Iterable[Operation]) -> list[LocalWork]:
        """See Transport."""
        works = [LocalWork(operation) for operation in operations]
        self.queue.append(works)
        return works

    @staticmethod
    def launch(work: Callable[[], object]) -> None:
        """See Transport."""
        work()


@checks_fields
@dataclass(frozen=True, slots=True)
class LocalTransport:
    """Runs a plan for all its ranks in this process.

    Args:
        grouped: whether a rank's rounds run one after the other, as on an NCCL stream.
        receives_ahead: how many rounds early receives are posted; only if not grouped.
        rounds_open: how many rounds may be in flight.
        reads: whether bytes move only when the receiving rank waits for them, as between ranks of one host; only if not
            grouped.

    Example:
        >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec, make_plan
        >>> rows = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (2, 2), "float32")
        >>> plan = make_plan(rows, ShardingSpec(Mesh([2], ("tp",)), (Replicate(),)))
        >>> LocalTransport().run(plan, {0: torch.zeros(1, 2), 1: torch.ones(1, 2)})
        {2: tensor([[0., 0.],
                [1., 1.]])}
    """

    grouped: bool = True
    receives_ahead: int = 0
    rounds_open: int = 2
    reads: bool = False

    def __post_init__(self) -> None:
        for name in ("receives_ahead", "rounds_open"):
            value = index(getattr(self, name))
            if value < 0:
                raise SpecError(f"{name}={value} must be at least 0; give a number of rounds")
            object.__setattr__(self, name, value)

    @explains_missing
    def run(self, plan: Planned, tensors: Mapping[int, Given]) -> dict[int, Any]:
        """Move the shards ``{source rank: shard}`` and return ``{destination rank: shard}``; of a plan of many tensors,
        ``{rank: {name: shard}}`` both.

        Raises:
            SpecError: a shard is missing, unexpected, or not what the plan's source says.
            TransportError: no rank can go on.

        Example:
            >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec, make_plan
            >>> spec = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (4,), "float32")
            >>> plan = make_plan({"w": spec}, {"w": ShardingSpec(Mesh([2], ("tp",)), (Replicate(),))})
            >>> LocalTransport().run(plan, {rank: {"w": torch.full((2,), float(rank))} for rank in (0, 1)})
            {2: {'w': tensor([0., 0., 1., 1.])}}
        """
        return self.run_observed(plan, tensors)[0]

    @explains_missing
    def run_counted(
        self, plan: Planned, tensors: Mapping[int, Given]
    ) -> tuple[dict[int, Any], dict[tuple[int, int], int]]:
        """As :meth:`run`; also the bytes that went over each ordered pair of ranks.

        >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec, make_plan
        >>> rows = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (2, 2), "float32")
        >>> plan = make_plan(rows, ShardingSpec(Mesh([2], ("tp",)), (Replicate(),)))
        >>> outputs, traffic = LocalTransport().run_counted(plan, {rank: torch.ones(1, 2) for rank in (0, 1)})
        >>> traffic
        {(0, 2): 8, (1, 2): 8}
        """
        outputs, traffic = self.run_observed(plan, tensors)
        return outputs, {pair: one.nbytes for pair, one in traffic.items()}

    @explains_missing
    def run_observed(
        self, plan: Planned, tensors: Mapping[int, Given]
    ) -> tuple[dict[int, Any], dict[tuple[int, int], Traffic]]:
        """As :meth:`run`; also the messages and bytes that went over each ordered pair of ranks.

        >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec, make_plan
        >>> rows = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (2, 2), "float32")
        >>> plan = make_plan(rows, ShardingSpec(Mesh([2], ("tp",)), (Replicate(),)))
        >>> outputs, traffic = LocalTransport().run_observed(plan, {rank: torch.ones(1, 2) for rank in (0, 1)})
        >>> traffic[0, 2]
        Traffic(transport='local', messages=1, nbytes=8, wait_seconds=0.0)
        """
        if not isinstance(plan, Plan | Selection):
            raise ArgumentError(f"plan={plan!r} is not a Plan; pass what make_plan gave")
        if not isinstance(tensors, Mapping):
            raise ArgumentError(f"tensors={tensors!r} is not a mapping; write {{rank: shard}}")
        depth = (0 if self.grouped else self.receives_ahead, self.rounds_open)
        network = LocalNetwork(self.grouped, depth, reads=self.reads and not self.grouped)
        given = chain.from_iterable(one.values() if isinstance(one, Mapping) else [one] for one in tensors.values())
        devices = (tensor.device for tensor in given if isinstance(tensor, torch.Tensor))
        device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
        for rank in tensors:
            if rank not in plan.participants:
                raise SpecError(
                    f"a tensor was given for rank {rank}, which is on neither mesh; the ranks are {plan.participants}, "
                    "so take it out"
                )
        outputs: dict[int, Any] = {}
        running: dict[int, Iterator[LocalWork]] = {}
        for rank in plan.participants:
            checker = TensorChecker(plan, rank, device)
            sources, destinations = checker.check(tensors.get(rank), None)
            if destinations:
                outputs[rank] = checker.result(destinations)
            running[rank] = PlanExecution(plan, rank, device).steps(
                sources, destinations, _fresh_staging(device), LocalEndpoint(network, rank)
            )
        _run_all(running, network)
        return outputs, network.traffic


def _run_all(running: dict[int, Iterator[LocalWork]], network: LocalNetwork) -> None:
    """Resume every rank until it waits; deliver when all wait; stop when all have ended."""
    waiting: dict[int, LocalWork | None] = dict.fromkeys(running)
    while waiting:
        for rank, work in list(waiting.items()):
            while work is None or work.done:
                work = next(running[rank], None)
                if work is None:
                    del waiting[rank]
                    break
                waiting[rank] = work
        if waiting and not network.deliver({*waiting.values()}):
            blocked = ", ".join(
                f"rank {rank} waits for rank {work.peer}" for rank, work in waiting.items() if work is not None
            )
            raise TransportError(f"deadlock: {blocked}; the plan's rounds do not match")


def _fresh_staging(device: torch.device) -> StagingProvider:
    """Staging full of 0xFF, so that a byte nobody wrote shows."""

    def staging(nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device)

    return staging
