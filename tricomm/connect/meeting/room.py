"""A meeting as a state machine without sockets: what happens and the time in, the next state out.

    a connection:   joins -> WAITING --all places are filled--> MEMBER of a new epoch
                    WAITING --says what contradicts others, or its place is taken--> REFUSED
                    WAITING, MEMBER --its connection is lost, or it leaves--> gone
                    MEMBER --joins again--> WAITING, and its epoch is over
    an epoch:       LIVE --a member is lost, or joins again--> OVER, for a reason that everybody is told
                    LIVE --a member leaves in peace--> ENDING: those that are in it go on, and all may pair anew
                    ENDING --a new epoch begins, or a member is lost--> OVER

Sides are equal: none decides, and none must be there first. An epoch does not change. Whoever was in one that is over
joins again, on the connection that it has.

All functions return a new value and change nothing. A connection is a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tricomm.connect.meeting.join import MAX_MISSING, Join, Missing, Paired, Place, Refused, Status

T = TypeVar("T")

TWICE_SECONDS = 2.0
"""How long one that comes to a place that is taken waits whether the other one is found dead."""

MAX_PAST = 16
"""For so many epochs it is remembered why they are over."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Who waits, and since when."""

    join: Join
    since: float


@dataclass(frozen=True, slots=True)
class Epoch:
    """Ranks that have met.

    Attributes:
        serial: never the same twice at one meeting.
        number: among these sides, from 1.
        sides: names and sizes in order.
        members: by connection, in the order of their ranks.
        left: those that are not in it any more, and how that is told.
        over: why it is over; "" while it is not.
    """

    serial: int
    number: int
    sides: tuple[tuple[str, int], ...]
    members: Mapping[int, Join]
    left: Mapping[int, str] = field(default_factory=dict)
    over: str = ""

    @property
    def is_live(self) -> bool:
        """Whether all members are in it."""
        return not self.over and not self.left

    def rank(self, connection: int) -> int:
        """Return the rank in the group of a member."""
        return list(self.members).index(connection)

    def describe(self, connection: int) -> str:
        """Say who a member is."""
        return f"rank {self.rank(connection)}, which is {self.members[connection]},"


@dataclass(frozen=True, slots=True)
class Room:
    """Those that want to meet each other.

    Attributes:
        epoch: the last one.
        waiting: by connection, in the order in which they came.
        refused: why, by connection.
        past: why epochs before the last one are over, by serial.
        note: what happened last that may be why somebody is missing.
    """

    epoch: Epoch | None = None
    waiting: Mapping[int, Waiting] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)
    past: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether nobody is here any more."""
        is_left = self.epoch is None or self.epoch.members.keys() <= self.epoch.left.keys()
        return is_left and not self.waiting and not self.refused


def join(room: Room, connection: int, who: Join, now: float) -> Room:
    """Somebody comes, or comes again."""
    epoch = room.epoch
    if epoch is not None and connection in epoch.members and connection not in epoch.left:
        if not epoch.over:
            epoch = replace(epoch, over=f"epoch {epoch.number} is over: {epoch.describe(connection)} pairs anew")
        room = replace(room, epoch=epoch)
    room = replace(room, refused=_without(room.refused, connection), waiting=_without(room.waiting, connection))
    for other in room.waiting.values():
        problem = find_difference(other.join, who)
        if problem:
            everybody = {**dict.fromkeys(room.waiting, problem), connection: problem}
            return replace(room, waiting={}, refused={**room.refused, **everybody}, note=problem)
    return replace(room, waiting={**room.waiting, connection: Waiting(who, now)})


def leave(room: Room, connection: int) -> Room:
    """Somebody goes in peace."""
    room = replace(room, refused=_without(room.refused, connection), waiting=_without(room.waiting, connection))
    epoch = room.epoch
    if epoch is None or connection not in epoch.members or connection in epoch.left:
        return room
    told = f"{epoch.describe(connection)} has left epoch {epoch.number}"
    return replace(room, epoch=replace(epoch, left={**epoch.left, connection: told}))


def lose(room: Room, connection: int, how: str) -> Room:
    """A connection is gone: the process behind it died, or does nothing any more."""
    was_here = room.waiting.get(connection)
    room = replace(room, refused=_without(room.refused, connection), waiting=_without(room.waiting, connection))
    if was_here is not None:
        room = replace(room, note=f"{was_here.join} waited here and {how}")
    epoch = room.epoch
    if epoch is None or connection not in epoch.members or connection in epoch.left:
        return room
    text = f"epoch {epoch.number} is over: {epoch.describe(connection)} {how}"
    return replace(room, epoch=replace(epoch, over=epoch.over or text, left={**epoch.left, connection: text}))


def settle(room: Room, now: float, heard: Mapping[int, float], serial: int) -> Room:
    """Refuse those whose place is taken, and begin an epoch if all are here.

    Args:
        room: the state.
        now: the time.
        heard: when each connection was last heard of.
        serial: of a new epoch.
    """
    holders = _holders(room)
    for connection, waiting in room.waiting.items():
        holder = holders[waiting.join.place]
        if holder != connection and heard.get(holder, now) > waiting.since + TWICE_SECONDS:
            held = room.waiting[holder].join if holder in room.waiting else _members(room)[holder]
            text = f"{waiting.join} came, and {held} is here already; start every rank once, or end the other first"
            room = replace(
                room,
                waiting=_without(room.waiting, connection),
                refused={**room.refused, connection: text},
                note=f"somebody was refused: {text}",
            )
    if (room.epoch is not None and room.epoch.is_live) or not room.waiting:
        return room
    holders = _holders(room)
    sides = _sides(room)
    places = [(side, rank) for side, size in sides for rank in range(size)]
    if any(size == 0 for _, size in sides) or any(place not in holders for place in places):
        return room
    members = {holders[place]: room.waiting[holders[place]].join for place in places}
    problem = find_shared_gpu(list(members.values()))
    if problem:
        return replace(
            room,
            waiting=_without(room.waiting, *members),
            refused={**room.refused, **dict.fromkeys(members, problem)},
            note=problem,
        )
    past, number = dict(room.past), 1
    if room.epoch is not None:
        number = room.epoch.number + 1
        past[room.epoch.serial] = room.epoch.over or f"epoch {room.epoch.number} is over: epoch {number} has begun"
    past = dict(list(past.items())[-MAX_PAST:])
    return Room(Epoch(serial, number, sides, members), _without(room.waiting, *members), room.refused, past)


def status_of(room: Room, connection: int, now: float, note: str = "") -> Status:
    """Return what somebody is told who asks; a note is for those who wait."""
    if connection in room.refused:
        return Refused(room.refused[connection])
    if connection in room.waiting:
        return _missing(room, now - room.waiting[connection].since, note)
    epoch = room.epoch
    if epoch is None or connection not in epoch.members:
        return Refused("this process is not at this meeting any more; connect again")
    if epoch.over:
        return Refused(epoch.over, is_over=True)
    left = {epoch.rank(other): text for other, text in epoch.left.items()}
    hosts = tuple(f"{who.host}" if _is_told_by_name(epoch, who) else f"{who.host}/{who.machine}" for who in _all(epoch))
    return Paired(epoch.serial, epoch.number, epoch.sides, hosts, left)


def who_is_missing(room: Room, names: tuple[str, ...]) -> Missing:
    """Return what those that wait are told, to somebody who only looks; all are missing where nobody waits."""
    if room.waiting:
        return _missing(room, 0.0, "")
    return Missing(0.0, tuple((name, -1) for name in names))


def over_reason(room: Room, connection: int, serial: int) -> str | None:
    """Return why a connection may not use the store of an epoch; None if it may."""
    epoch = room.epoch
    if epoch is not None and epoch.serial == serial:
        if connection not in epoch.members:
            return f"this process is not in epoch {epoch.number}"
        return epoch.over or None
    return room.past.get(serial, "the epoch is over, or there never was one; pair anew with renew()")


def find_difference(one: Join, other: Join) -> str:
    """Say what two ranks that want to meet do not agree about; "" if nothing."""
    if one.names != other.names:
        return (
            f"{one} lists the sides as {list(one.names)}, and {other} as {list(other.names)}; write side_sizes in the "
            "same order on all ranks, as the ranks of the sides follow each other so"
        )
    for (name, size), (_, said) in zip(one.sides, other.sides, strict=True):
        if size and said and size != said:
            return (
                f"{one} says that side {name!r} has {size} ranks, and {other} that it has {said}; give the same size, "
                "or None for a side that says it itself"
            )
    ours, theirs = dict(one.facts), dict(other.facts)
    for what in {**ours, **theirs}:
        if ours.get(what) != theirs.get(what):
            return (
                f"{one} has {what} {ours.get(what, '(none)')}, and {other} has {what} {theirs.get(what, '(none)')}; "
                "both sides need the same"
            )
    return ""


def find_shared_gpu(members: list[Join]) -> str:
    """Say which two ranks would bring one GPU into one NCCL communicator, which NCCL does not bear; "" if none."""
    seen: dict[tuple[str, str], Join] = {}
    for who in members:
        if not who.gpu or dict(who.facts).get("backend") != "nccl":
            continue
        first = seen.setdefault((who.machine, who.gpu), who)
        if first is not who:
            return (
                f"{first} and {who} are both on GPU {who.gpu}, and NCCL takes a GPU once; put the sides on different "
                'GPUs, or connect(..., device="cpu") and move host tensors'
            )
    return ""


def _members(room: Room) -> Mapping[int, Join]:
    return {} if room.epoch is None else room.epoch.members


def _all(epoch: Epoch) -> list[Join]:
    return list(epoch.members.values())


def _is_told_by_name(epoch: Epoch, who: Join) -> bool:
    """Whether no other machine has the same name."""
    return all(other.machine == who.machine for other in _all(epoch) if other.host == who.host)


def _holders(room: Room) -> dict[Place, int]:
    """Return the connection that has each place: a member of the live epoch, else who came first."""
    found: dict[Place, int] = {}
    if room.epoch is not None and room.epoch.is_live:
        found = {who.place: connection for connection, who in room.epoch.members.items()}
    for connection, waiting in room.waiting.items():
        found.setdefault(waiting.join.place, connection)
    return found


def _sides(room: Room) -> tuple[tuple[str, int], ...]:
    """Return the sides that those who wait agree on; size 0 where nobody has said it."""
    joins = [waiting.join for waiting in room.waiting.values()]
    return tuple((name, max(dict(who.sides)[name] for who in joins)) for name in joins[0].names)


def _missing(room: Room, seconds: float, note: str) -> Missing:
    here = {waiting.join.place for waiting in room.waiting.values()}
    places: list[Place] = []
    for side, size in _sides(room):
        ranks = range(size) if size else (-1,)
        places += [(side, rank) for rank in ranks if (side, rank) not in here][: MAX_MISSING - len(places)]
    epoch = room.epoch
    busy: tuple[Place, ...] = ()
    if epoch is not None:
        there = {who.place for connection, who in epoch.members.items() if connection not in epoch.left}
        busy = tuple(place for place in places if place in there - here)
    return Missing(seconds, tuple(places), busy, "; ".join(filter(None, (room.note, note))))


def _without(given: Mapping[int, T], *connections: int) -> dict[int, T]:
    return {connection: value for connection, value in given.items() if connection not in connections}
