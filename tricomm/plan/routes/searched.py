"""Plans that are searched for on every rank: what that costs, how much is refused, and a folder to keep them in."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from tricomm.errors import PlanError
from tricomm.plan.routes.joined import Routes
from tricomm.plan.routes.stored import read, written
from tricomm.plan.routes.strategies import Strategy
from tricomm.plan.tasks import Tasks

SECONDS_PER_DELIVERY = 180e-6
NBYTES_PER_DELIVERY = 8_000
"""What one task for one receiver takes, as measured for 64 to 256 ranks a side on one core."""

WORTH_SAYING = 1 << 14
"""From so many deliveries on a search warns: it takes more than a second."""

MOST_DELIVERIES = 1 << 20
"""More are refused: they would take minutes and gigabytes on every rank."""


def deliveries_of(tasks: Sequence[Tasks]) -> int:
    """Count the tasks, each as often as it has receivers."""
    return sum(int(one.receiver_sets.sizes[one.receivers].sum()) for one in tasks)


def check_search(deliveries: int, is_kept: bool) -> None:
    """Say what a search costs if that is much, and refuse it if it is too much.

    Raises:
        PlanError: more than ``MOST_DELIVERIES``.
    """
    seconds, nbytes = deliveries * SECONDS_PER_DELIVERY, deliveries * NBYTES_PER_DELIVERY
    cost = f"{deliveries} deliveries (tasks times receivers): {seconds:.0f} s and {nbytes / 1e9:.1f} GB on every rank"
    remedy = (
        "layouts that are grids of parts, as mesh axes make them, on NICs that are equally fast within a mesh, are "
        "planned by formulas with Split() and Auto(), SendRecv(), Broadcast() or GlobalAllGather()"
    )
    if deliveries > MOST_DELIVERIES:
        raise PlanError(
            f"this plan would be searched for among {cost}, and at most {MOST_DELIVERIES} are; {remedy}; or divide "
            "the tensors among several calls"
        )
    if deliveries > WORTH_SAYING and not is_kept:
        warnings.warn(
            f"this plan is searched for among {cost}; {remedy}; Auto(cache=folder) keeps what was found", stacklevel=2
        )


def kept(folder: str, key: str, strategies: Sequence[Strategy], search: Callable[[], Routes]) -> Routes:
    """Read what was found for a key from a folder, or find it and write it there.

    Args:
        folder: that this user alone should write: what is read runs nothing, but how tensors move follows it.
        key: text that determines what is found.
        strategies: one of which is found.
        search: finds it.

    Raises:
        PlanError: a file that cannot be read.
    """
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
    path = Path(folder, f"{digest}.plan")
    if path.exists():
        try:
            found = read(path.read_bytes(), key, strategies)
        except Exception as error:
            raise PlanError(
                f"the kept plan {path} cannot be read ({error!r}); delete it, and it is made again"
            ) from error
        return found
    found = search()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(written(found, key, strategies))
    unfinished.replace(path)
    return found
