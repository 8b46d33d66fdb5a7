"""The diagnosis of a wait that took too long: who is at fault, found from what ranks say of themselves.

Pure functions of heartbeats. A rank *is silent* if its heartbeat has not changed for a while; what is waited for in the
end is a silent rank, a rank that is alive and does something else, or a circle of ranks.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from tricomm.transport.coordination.order import same_order_rule
from tricomm.transport.coordination.status import Heartbeat, StatusStore, Wait

MAX_RANKS = 64
"""Query at most this many ranks for heartbeats; each answer takes two calls of the store."""

MAX_CIRCLE = 8
"""A circle of more ranks that wait for each other is found at the deadline only."""

SILENT_HEARTBEATS = 1.5
"""A rank is silent if its heartbeat did not change for so many intervals."""

Heartbeats = Mapping[int, Heartbeat]


class Diagnosis(NamedTuple):
    """Who is at fault for a wait that took too long.

    Attributes:
        text: in words.
        late: the rank that did not come, and may still; None if ranks wait for each other.
    """

    text: str
    late: int | None = None


def diagnose(rank: int, wait: Wait, heartbeats: Heartbeats, silent: Collection[int]) -> Diagnosis:
    """Say who is at fault for a wait that took too long.

    Args:
        rank: the one that waited.
        wait: in what, and for whom.
        heartbeats: of all ranks that ``reachable`` finds.
        silent: those of them whose heartbeat did not change.

    Example:
        >>> mine = Wait("link", 1, "call 2 of Resharder 'a'")
        >>> print(diagnose(0, mine, {1: Heartbeat(7, (Wait("link", 0, "call 1 of Resharder 'b'"),))}, set()).text)
        rank 0 waits for rank 1 in call 2 of Resharder 'a', and rank 1 for rank 0 in call 1 of Resharder 'b'; every \
rank must make the same calls in the same order
    """
    assert wait.peer is not None
    ends = find_ends(rank, wait, heartbeats, silent)
    if ends:
        at = next((end for end in ends if end in silent), ends[0])
        here = heartbeats[at].wait_in(wait.place) if at not in silent else None
        if here is None:
            return _describe_end(rank, wait, at, heartbeats, silent)
        return _describe_busy(rank, wait, at, heartbeats[at].waits[:1] if _computes(heartbeats[at]) else ())
    followed, at = {rank: wait}, wait.peer
    while at not in followed:
        here = heartbeats[at].wait_in(wait.place)
        assert here is not None
        assert here.peer is not None
        followed[at] = here
        at = here.peer
    circle = list(followed)[list(followed).index(at) :]
    return Diagnosis(_describe_circle({member: followed[member] for member in circle}, followed[rank]))


def find_ends(rank: int, wait: Wait, heartbeats: Heartbeats, silent: Collection[int]) -> list[int]:
    """Return the ranks that are waited for in the end, and wait for nobody in the same place; none in a circle.

    Args:
        rank, wait, heartbeats, silent: as for ``diagnose``.
    """
    seen, ahead, ends = {rank}, list(wait.peers), []
    while ahead:
        at = ahead.pop(0)
        if at in seen or at not in heartbeats:
            continue
        seen.add(at)
        here = heartbeats[at].wait_in(wait.place) if at not in silent else None
        if here is None or here.peer is None:
            ends.append(at)
        else:
            ahead.extend(here.peers)
    return ends


def find_other_order(rank: int, wait: Wait, heartbeat_of: Callable[[int], Heartbeat]) -> str | None:
    """Say that ranks wait for each other in different calls, where all should be in the same one; None if they do not.

    Args:
        rank, wait: of this rank, in a communicator.
        heartbeat_of: a rank's last heartbeat. Only that of the next rank is read as long as it is in the same call.

    Example:
        >>> mine = Wait("link", 1, "call 2 of Resharder 'a'", position=5)
        >>> theirs = Heartbeat(7, (Wait("link", 0, "call 1 of Resharder 'b'", position=5),))
        >>> print(find_other_order(0, mine, {1: theirs}.__getitem__))
        rank 0 waits for rank 1 in call 2 of Resharder 'a', and rank 1 for rank 0 in call 1 of Resharder 'b'; every \
rank must make the same calls in the same order
    """
    circle, here, resharder = {rank: wait}, wait, _resharder_of(wait.call)
    while here.peer is not None and here.peer not in circle and len(circle) <= MAX_CIRCLE:
        at = here.peer
        there = heartbeat_of(at).wait_in(wait.place)
        if (
            there is None
            or there.position != wait.position
            or (len(circle) == 1 and _resharder_of(there.call) == resharder)
        ):
            return None
        circle[at] = here = there
    return _describe_circle(circle, wait) if here.peer == rank else None


def describe_missed(
    rank: int, call: str, begun: int, place: str, other: int, heartbeat: Heartbeat, present: Collection[int]
) -> str | None:
    """Say that a rank waits in a call which those at a rendezvous have not begun; None if it does not.

    Args:
        rank, call: at the rendezvous, for which the other one is missed.
        begun: how many calls that rank has begun in the communicator of the same ranks.
        place: the communicator.
        other, heartbeat: the rank that is missed, and its last one.
        present: the ranks at the rendezvous.
    """
    there = heartbeat.wait_in(place)
    awaited = [peer for peer in there.peers if peer in present] if there is not None else []
    if there is None or not awaited or there.position <= begun:
        return None
    return (
        f"rank {other} waits for rank {awaited[0]} in {there.call}, and rank {rank} for rank {other} in {call}; "
        f"{same_order_rule(there.call, call)}"
    )


def diagnose_connecting(rank: int, call: str, participants: Sequence[int], silent: Collection[int]) -> Diagnosis:
    """Say who is at fault if ranks could not connect: the first that is silent."""
    found = [other for other in participants if other != rank and other in silent]
    if not found:
        return Diagnosis(f"ranks {list(participants)} did not connect within the timeout in {call}; raise the timeout")
    return Diagnosis(
        f"rank {found[0]} gave no sign of life while ranks {list(participants)} connected in {call}: it died, hangs or "
        "is stopped; see that rank's log",
        found[0],
    )


def describe_lost(rank: int, call: str, suspects: Sequence[int], error: str) -> str:
    """Say who is at fault if a backend lost a connection to one of some ranks, of which it does not say which.

    Args:
        rank: the one that waited.
        call: in words.
        suspects: the ranks; those that are silent, if any is.
        error: what the backend says.
    """
    said = error.strip().splitlines()[0] if error.strip() else "no reason given"
    if len(suspects) == 1:
        who = f"rank {suspects[0]} died or hangs: rank {rank} lost its connection to it"
    elif suspects:
        who = f"one of ranks {list(suspects)} died or hangs: rank {rank} lost its connection to it"
    else:
        who = f"rank {rank} could not go on"
    return f"{who} in {call}; see that rank's log ({said})"


def describe_silent_device(rank: int, call: str) -> str:
    """Say that a device answered nothing until a call's time was over.

    Args:
        rank: whose device.
        call: in words.
    """
    return (
        f"the device of rank {rank} answers nothing in {call}: most likely it loads a kernel that is new to it, which "
        "waits for whatever runs there, while messages are under way; run what comes next once before they are"
    )


def reachable(me: int, first: Sequence[int], heartbeat_of: Mapping[int, Heartbeat] | StatusStore) -> Iterator[int]:
    """The ranks ``first``, then those for whom they wait anywhere, and so on, but not this rank."""
    seen, ahead = {me}, list(first)
    while ahead and len(seen) <= MAX_RANKS:
        rank = ahead.pop(0)
        if rank in seen:
            continue
        seen.add(rank)
        yield rank
        heartbeat = heartbeat_of.heartbeat_of(rank) if isinstance(heartbeat_of, StatusStore) else heartbeat_of[rank]
        ahead.extend(sorted(peer for wait in heartbeat.waits for peer in wait.peers))


class Observations:
    """When the heartbeats of other ranks were last seen to change.

    Args:
        status: where they are read.
    """

    def __init__(self, status: StatusStore) -> None:
        self._status = status
        self._seen: dict[int, tuple[Heartbeat, float]] = {}

    def look(self, first: Sequence[int], now: float) -> dict[int, Heartbeat]:
        """Read the heartbeats that matter for a wait for these ranks."""
        found = {}
        for rank in reachable(self._status.rank, first, self._status):
            heartbeat = self._status.heartbeat_of(rank)
            before = self._seen.get(rank)
            if before is None or before[0].number != heartbeat.number:
                self._seen[rank] = (heartbeat, now)
            found[rank] = heartbeat
        return found

    def silent(self, ranks: Collection[int], now: float, seconds: float) -> set[int]:
        """Return the ranks whose heartbeat has been the same for some seconds."""
        return {rank for rank in ranks if now - self._seen[rank][1] >= seconds}

    def clear(self) -> None:
        """Forget everything: nothing is watched any more."""
        self._seen.clear()


def _describe_end(rank: int, wait: Wait, at: int, heartbeats: Heartbeats, silent: Collection[int]) -> Diagnosis:
    """The chain of waits in one place ends at a rank that is not there: the nearest silent rank from there on, else the
    nearest that computes (see ``Monitor.computing``), else that rank itself.
    """
    for other in reachable(rank, [at], heartbeats):
        if other in silent:
            return Diagnosis(
                f"rank {other} gave no sign of life within the timeout: it hangs, is stopped, or never made this call; "
                f"see that rank's log (rank {rank} waited for rank {wait.peer} in {wait.call})",
                other,
            )
    computing = (other for other in reachable(rank, [at], heartbeats) if _computes(heartbeats[other]))
    at = next(computing, at)
    return _describe_busy(rank, wait, at, heartbeats[at].waits)


def _computes(heartbeat: Heartbeat) -> bool:
    """Whether the rank computes while what it has posted waits in the background."""
    return bool(heartbeat.waits) and not heartbeat.waits[0].place


def _describe_busy(rank: int, wait: Wait, at: int, elsewhere: Sequence[Wait]) -> Diagnosis:
    other = f", and rank {at} is in {elsewhere[0].call}" if elsewhere else ""
    return Diagnosis(
        f"rank {at} is alive but did not send or receive within the timeout; it makes another call, is busy elsewhere "
        f"or the timeout is too short (rank {rank} waited for rank {wait.peer} in {wait.call}{other})",
        at,
    )


def _describe_circle(circle: Mapping[int, Wait], wait: Wait) -> str:
    """Ranks wait for each other: in different calls, or in the same one."""
    if len({_resharder_of(one.call) for one in circle.values()}) == 1:
        return (
            f"ranks {sorted(circle)} wait for each other until the timeout in {wait.call}; raise the timeout if the "
            "network is slow, and report both specs if it is not"
        )
    (first, one), *others = circle.items()
    told = [f"rank {first} waits for rank {one.peer} in {one.call}"]
    told += [f"rank {member} for rank {other.peer} in {other.call}" for member, other in others]
    return f"{', and '.join(told)}; {same_order_rule(*told)}"


def _resharder_of(call: str) -> str:
    """The words of a call without its number."""
    return call.partition(" of ")[2]
