"""The protocol of one host as a model: every order of events for two ranks, and random ones for more transfers."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tricomm.transport.memory.protocol import (
    RECEIVING,
    SENDING,
    Action,
    Done,
    Event,
    Nod,
    Ready,
    Receiving,
    Sending,
    Slab,
    decode,
    encode,
)

HALVES = 2
"""A read is not one moment: it takes a first and a second half."""


LEAVING = ("close", "return")
"""What an end that fails does, in this order: nobody reads for a user who has control again."""


@dataclass(frozen=True)
class Rules:
    """What both ends obey, so that a fault can be planted."""

    receiving: Mapping[tuple[Receiving, Event], tuple[Receiving, Action]]
    sending: Mapping[tuple[Sending, Event], tuple[Sending, Action]]
    leaving: tuple[str, ...] = LEAVING
    awaits_done: bool = True
    """Before a slab is used again."""


RULES = Rules(RECEIVING, SENDING)


@dataclass(frozen=True)
class World:
    """Two ranks and the link between them. The sender's user writes ``version`` into the bytes before each call.

    Attributes:
        calls: how many the sender still makes.
        is_eager: whether it copies the bytes to its only slab where that is free, and does not wait.
        version: what stands in its bytes now; None when its process has gone.
        sender: of the transfer that is offered; None between calls.
        leaving: what a sender that fails has still to do.
        slab: the version that stands there; the receiver has it mapped, and it outlives the sender.
        is_slab_free: whether the sender may use it.
        to_receiver, to_sender: messages under way, each (version, whether it is in the slab).
        closed: whether the link is.
        receiver: of the transfer that is awaited; None when it has left.
        ready: what READY was told for, of the transfer that is read, as (version, whether it is in the slab).
        halves: the versions that were read.
        counted: (offered, read) of what the receiver has given to its user.
    """

    calls: int
    is_eager: bool = False
    version: int | None = 0
    sender: Sending | None = None
    leaving: tuple[str, ...] = ()
    slab: int | None = None
    is_slab_free: bool = True
    to_receiver: tuple[tuple[int, bool], ...] = ()
    to_sender: tuple[tuple[int, bool], ...] = ()
    closed: bool = False
    receiver: Receiving | None = Receiving.WAITING
    ready: tuple[int, bool] = (0, False)
    halves: tuple[int | None, ...] = ()
    counted: tuple[tuple[int, tuple[int | None, ...]], ...] = ()


def sender_moves(world: World, rules: Rules) -> Iterator[World]:
    """Everything that the sender, its user, or a signal may do next."""
    if world.version is None:
        return
    if world.leaving:
        first, *rest = world.leaving
        left = replace(world, leaving=tuple(rest))
        # Its user has control again, and changes the bytes; no more calls on this link.
        yield replace(left, closed=True) if first == "close" else replace(left, version=-1, sender=None, calls=0)
        return
    if world.sender is None and world.calls:
        version = world.version + 1
        copies = world.is_eager and (world.is_slab_free or not rules.awaits_done)
        offered = replace(
            world,
            calls=world.calls - 1,
            version=version,
            to_receiver=(*world.to_receiver, (version, copies)),
        )
        if copies:
            yield replace(offered, slab=version, is_slab_free=False)
        else:
            yield replace(offered, sender=Sending.OFFERED)
    if world.to_sender and world.to_sender[0][1]:
        yield replace(world, to_sender=world.to_sender[1:], is_slab_free=True)
    elif world.sender is Sending.OFFERED:
        event = Event.DONE if world.to_sender else Event.CLOSED if world.closed else None
        if event is not None:
            state, action = rules.sending[world.sender, event]
            after = replace(world, to_sender=world.to_sender[1:] if event is Event.DONE else world.to_sender)
            if action is Action.RETURN:
                yield replace(after, sender=None)
            else:
                yield replace(after, sender=state, leaving=rules.leaving)
        else:
            yield replace(world, sender=Sending.LOST, leaving=rules.leaving)  # a timeout, or Ctrl-C
    yield replace(world, version=None, closed=True, sender=None, calls=0)  # killed: the kernel closes, memory goes


def receiver_moves(world: World, rules: Rules) -> Iterator[World]:
    """Everything that the receiver may do next."""
    state = world.receiver
    if state in (None, Receiving.LOST, Receiving.UNREADABLE):
        return

    def react(event: Event, world: World) -> World:
        after, action = rules.receiving[state, event]
        if action is Action.READ:
            return replace(world, receiver=after, halves=())
        if action is Action.TELL_DONE:
            counted = (*world.counted, (world.ready[0], world.halves))
            told = world.to_sender if world.closed else (*world.to_sender, world.ready)
            return replace(world, receiver=Receiving.WAITING, to_sender=told, counted=counted)
        if action is Action.FAIL:
            return replace(world, receiver=after, closed=True)
        return replace(world, receiver=after)

    match state:
        case Receiving.WAITING if world.to_receiver:
            first, *rest = world.to_receiver
            yield react(Event.READY, replace(world, to_receiver=tuple(rest), ready=first))
        case Receiving.WAITING if world.closed:
            yield react(Event.CLOSED, world)
        case Receiving.READING if len(world.halves) < HALVES:
            read = world.slab if world.ready[1] else world.version
            yield replace(world, halves=(*world.halves, read))
        case Receiving.READING if world.ready[1]:
            yield react(Event.ALL_COPIED, world)
        case Receiving.READING:
            yield react(Event.NOT_ALL_READ if None in world.halves else Event.ALL_READ, world)
        case Receiving.CHECKING | Receiving.DOUBTING:
            yield react(Event.CLOSED if world.closed else Event.STANDS, world)
    yield replace(world, receiver=None, closed=True)  # its own timeout, cancellation or death, in any state


def moves(world: World, rules: Rules) -> list[World]:
    return [*sender_moves(world, rules), *receiver_moves(world, rules)]


def problem(world: World, after: list[World]) -> str | None:
    """THE PROMISE: what was counted is what was offered, whole; and nobody waits for ever."""
    for offered, halves in world.counted:
        if halves != (offered,) * HALVES:
            return f"offered {offered}, counted {halves}"
    # Only what an end does by itself counts: a timeout must not be what saves it.
    waits = world.sender is Sending.OFFERED and not world.to_sender and not world.closed
    if waits and world.receiver in (None, Receiving.LOST, Receiving.UNREADABLE):
        return "the sender waits for one that has left"
    gone = world.version is None or (world.calls == 0 and world.sender is None and world.closed)
    if gone and world.receiver is Receiving.WAITING and not after:
        return "the receiver waits for one that has left"
    return None


def explore(first: World, rules: Rules) -> tuple[int, str | None]:
    """(how many different worlds there are, what is wrong in one of them)."""
    seen, ahead = {first}, [first]
    while ahead:
        world = ahead.pop()
        after = moves(world, rules)
        found = problem(world, after)
        if found is not None:
            return len(seen), found
        for one in after:
            if one not in seen:
                seen.add(one)
                ahead.append(one)
    return len(seen), None


@pytest.mark.parametrize("is_eager", [False, True])
def test_every_order_of_events_keeps_the_promise(is_eager: bool) -> None:
    count, found = explore(World(3, is_eager), RULES)
    assert found is None
    assert count > 200


def test_whole_moves_are_among_them() -> None:
    """The model is not empty: all calls can succeed, and some worlds have read torn bytes that were not counted."""
    seen, ahead = set(), [World(calls=2)]
    torn = whole = False
    while ahead:
        world = ahead.pop()
        whole |= [offered for offered, _ in world.counted] == [1, 2] and not world.closed
        torn |= len(set(world.halves)) == 2
        for one in moves(world, RULES):
            if one not in seen:
                seen.add(one)
                ahead.append(one)
    assert whole
    assert torn


def counts_before_the_check(rules: Rules) -> Rules:
    receiving = dict(rules.receiving)
    receiving[Receiving.READING, Event.ALL_READ] = (Receiving.HAS, Action.TELL_DONE)
    return replace(rules, receiving=receiving)


def changes_before_the_close(rules: Rules) -> Rules:
    return replace(rules, leaving=LEAVING[::-1])


def counts_what_was_not_read(rules: Rules) -> Rules:
    receiving = dict(rules.receiving)
    receiving[Receiving.READING, Event.NOT_ALL_READ] = (Receiving.HAS, Action.TELL_DONE)
    return replace(rules, receiving=receiving)


def fills_a_slab_that_is_read(rules: Rules) -> Rules:
    return replace(rules, awaits_done=False)


FAULTS = [counts_before_the_check, changes_before_the_close, counts_what_was_not_read]


@pytest.mark.parametrize(
    ("fault", "is_eager"), [*((fault, False) for fault in FAULTS), (fills_a_slab_that_is_read, True)]
)
def test_a_planted_fault_is_found(fault: Callable[[Rules], Rules], is_eager: bool) -> None:
    assert explore(World(2, is_eager), fault(RULES))[1] is not None


@pytest.mark.parametrize("seed", range(20))
def test_random_orders_of_many_calls_keep_the_promise(seed: int) -> None:
    drawn = random.Random(seed)
    for number in range(50):
        world, steps = World(12, number % 2 == 1), 0
        while steps < 400:
            after = moves(world, RULES)
            assert problem(world, after) is None
            if not after:
                break
            # What ends everything is among the last of the moves, and is drawn seldom.
            world = drawn.choice(after) if drawn.random() < 0.03 else drawn.choice(after[: max(1, len(after) - 1)])
            steps += 1


@pytest.mark.parametrize("message", [Ready(2**40, 7, 2**41, 2**47 - 1, 1024, 3), Done(9), Slab(4, 2**33), Nod(2**31)])
def test_messages_are_what_they_were(message: Any) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x09abc", b"\x01short"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="a message of"):
        decode(data)
