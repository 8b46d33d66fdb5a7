"""What make_plan takes, checked for its kind before anything else."""

from tricomm.errors import ArgumentError, PlanError, SpecError
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.routes.strategies import Auto


def check_spec(name: str, spec: object) -> None:
    """Refuse what is not a layout.

    Raises:
        ArgumentError: not a ShardingSpec.
    """
    if not isinstance(spec, ShardingSpec):
        raise ArgumentError(
            f"{name}={spec!r} is not a ShardingSpec; write ShardingSpec(mesh, placements, shape, dtype)"
        )


def check_strategy(strategy: object) -> None:
    """Refuse what does not route.

    Raises:
        ArgumentError: not a strategy, or one that cannot be hashed.
    """
    is_strategy = hasattr(strategy, "route") or isinstance(strategy, Auto)
    if isinstance(strategy, type) or not is_strategy or not _is_hashable(strategy):
        raise ArgumentError(
            f"strategy={strategy!r} is not a strategy; pass Auto(), Broadcast(), LocalAllGather(), GlobalAllGather() "
            "or SendRecv()"
        )


def check_balance(balance: object) -> None:
    """Refuse what does not choose senders.

    Raises:
        ArgumentError: not a choice of senders, or one that cannot be hashed.
    """
    if isinstance(balance, type) or not hasattr(balance, "assign") or not _is_hashable(balance):
        raise ArgumentError(
            f"balance={balance!r} is not a sender policy; pass Split(), LeastLoaded(), Search(), RandomizedGreedy(), "
            "Ensemble() or Naive()"
        )


def check_topology(topology: object) -> None:
    """Refuse what names no hosts.

    Raises:
        ArgumentError: neither a Topology nor None.
    """
    if topology is not None and not isinstance(topology, Topology):
        raise ArgumentError(
            f"topology={topology!r} is not a Topology; write Topology(hosts), one host name per rank, or leave it out"
        )


def check_staging_bytes(staging_bytes: object) -> None:
    """Refuse a staging budget that is no budget.

    Raises:
        ArgumentError: not an integer.
        PlanError: none or less.
    """
    if isinstance(staging_bytes, bool) or not isinstance(staging_bytes, int):
        raise ArgumentError(f"staging_bytes={staging_bytes!r} must be a number of bytes, an integer such as 256 << 20")
    if staging_bytes <= 0:
        raise PlanError(f"staging_bytes={staging_bytes!r} must be a positive number of bytes, such as 256 << 20")


def check_rank(rank: object) -> None:
    """Refuse a rank that is not one.

    Raises:
        ArgumentError: neither an integer from 0 on nor None.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ArgumentError(f"rank={rank!r} is not a rank; pass an integer from 0 on, or None for all ranks")


def check_ranks(side: str, spec: ShardingSpec, size: int) -> None:
    """Refuse a mesh with ranks outside of a process group.

    Raises:
        SpecError: there is one.
    """
    outside = [rank for rank in spec.mesh.ranks if rank >= size]
    if outside:
        raise SpecError(
            f"rank {outside[0]} of the {side} mesh {spec.mesh} is outside of the process group, which has ranks 0 to "
            f"{size - 1}; use ranks of the group, or pass the group that has them"
        )


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
