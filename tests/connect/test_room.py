"""Every transition of a meeting, without processes: what happens and the time in, who is told what out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tricomm.connect.meeting.join import Join, Missing, Paired, Refused
from tricomm.connect.meeting.room import (
    TWICE_SECONDS,
    Room,
    find_difference,
    join,
    leave,
    lose,
    over_reason,
    settle,
    status_of,
    who_is_missing,
)

SIDES = (("trainer", 2), ("server", 1))
FACTS = (("torch", "2.13.0"), ("backend", "gloo"))
TRAINERS = {1: Join(SIDES, "trainer", 0, "a", 11, facts=FACTS), 2: Join(SIDES, "trainer", 1, "a", 12, facts=FACTS)}
SERVER = Join(SIDES, "server", 0, "b", 13, facts=FACTS)
ALL = {**TRAINERS, 3: SERVER}
DIED = "died: its connection to the meeting closed; see its log"


def come(room: Room, who: Mapping[int, Join], now: float = 0.0, heard: Mapping[int, float] | None = None) -> Room:
    for connection, one in who.items():
        room = settle(join(room, connection, one, now), now, heard or {}, serial_after(room))
    return room


def serial_after(room: Room) -> int:
    return 1 if room.epoch is None else room.epoch.serial + 1


def text_of(room: Room, connection: int) -> str:
    found = status_of(room, connection, 0.0)
    assert isinstance(found, Refused), found
    return found.text


def test_ranks_wait_and_are_told_for_whom() -> None:
    room = come(Room(), TRAINERS, now=5.0)
    found = status_of(room, 1, 8.5)
    assert found == Missing(3.5, (("server", 0),))
    assert str(found) == "waiting for rank 0 of side 'server' since 3.5 s"
    assert str(status_of(room, 2, 8.5, "1 wrong secret")).endswith("since 3.5 s; 1 wrong secret")


def test_when_all_are_there_they_are_one_group_in_the_order_of_the_sides() -> None:
    for order in ([1, 2, 3], [3, 2, 1], [2, 3, 1]):
        room = come(Room(), {connection: ALL[connection] for connection in order})
        assert room.epoch is not None
        assert list(room.epoch.members) == [1, 2, 3]
        for connection in order:
            assert status_of(room, connection, 9.0) == Paired(1, 1, SIDES, ("a", "a", "b"), {})
            assert over_reason(room, connection, 1) is None
        assert over_reason(room, 4, 1) == "this process is not in epoch 1"


def test_one_that_only_looks_sees_who_waits() -> None:
    names = ("trainer", "server")
    assert who_is_missing(Room(), names) == Missing(0.0, (("trainer", -1), ("server", -1)))
    room = come(Room(), {3: SERVER})
    assert who_is_missing(room, names).places == (("trainer", 0), ("trainer", 1))
    assert who_is_missing(come(Room(), ALL), names).places == (("trainer", -1), ("server", -1)), "nobody waits"


def test_a_side_says_its_own_size() -> None:
    open_sides = (("trainer", 2), ("server", 0))
    trainers = {connection: replace(one, sides=open_sides) for connection, one in TRAINERS.items()}
    room = come(Room(), trainers)
    assert status_of(room, 1, 1.0) == Missing(1.0, (("server", -1),))
    assert "all of side 'server'" in str(status_of(room, 1, 1.0))
    room = come(room, {3: replace(SERVER, sides=(("trainer", 0), ("server", 1)))})
    assert status_of(room, 1, 1.0) == Paired(1, 1, SIDES, ("a", "a", "b"), {})


DIFFERENCES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "torch": ({"facts": (("torch", "2.12.0"), ("backend", "gloo"))}, ["torch 2.13.0", "torch 2.12.0", "the same"]),
    "backend": ({"facts": (("torch", "2.13.0"), ("backend", "nccl"))}, ["backend gloo", "backend nccl"]),
    "fact that one has not": ({"facts": FACTS[:1]}, ["backend gloo", "backend (none)"]),
    "size": ({"sides": (("trainer", 3), ("server", 1))}, ["'trainer' has 2 ranks", "that it has 3", "or None"]),
    "order": ({"sides": tuple(reversed(SIDES))}, ["['trainer', 'server']", "['server', 'trainer']", "same order"]),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_difference_is_told_to_both_with_both_names(what: str) -> None:
    changes, words = DIFFERENCES[what]
    room = come(Room(), TRAINERS)
    room = come(room, {3: replace(SERVER, **changes)})
    texts = {text_of(room, connection) for connection in (1, 2, 3)}
    assert len(texts) == 1
    (text,) = texts
    for word in [*words, "rank 0 of side 'trainer' (host a, process 11)", "(host b, process 13)"]:
        assert word in text
    later = come(room, {4: replace(TRAINERS[1])})
    assert words[0] in str(status_of(later, 4, 1.0)), "who comes after it hears of it while it waits"


def test_those_that_were_refused_may_come_again() -> None:
    room = come(Room(), TRAINERS)
    room = come(room, {3: replace(SERVER, facts=())})
    room = come(room, ALL)
    assert all(isinstance(status_of(room, connection, 0.0), Paired) for connection in ALL)


def test_one_that_comes_twice_is_refused_and_the_first_goes_on() -> None:
    room = come(Room(), {1: TRAINERS[1]}, now=0.0)
    room = come(room, {9: replace(TRAINERS[1], pid=99)}, now=1.0)
    still = settle(room, 1.0 + TWICE_SECONDS + 0.5, {1: 1.0 + TWICE_SECONDS}, 1)
    assert isinstance(status_of(still, 9, 4.0), Missing), "perhaps the first has died, and that is not known yet"
    room = settle(room, 4.0, {1: 3.5}, 1)
    text = text_of(room, 9)
    assert "process 99) came, and rank 0 of side 'trainer' (host a, process 11) is here already" in text
    assert isinstance(status_of(room, 1, 4.0), Missing)
    assert "process 99) came" in str(status_of(room, 1, 4.0)), "the first is told too"


def test_one_that_comes_into_a_running_epoch_is_refused_and_the_epoch_goes_on() -> None:
    room = come(Room(), ALL)
    room = come(room, {9: replace(SERVER, pid=99)}, now=10.0)
    assert "to hear whether those that are in these places are alive" in str(
        status_of(come(Room(epoch=room.epoch), {9: SERVER, 8: TRAINERS[1], 7: TRAINERS[2]}), 9, 0.0)
    )
    room = settle(room, 13.0, {3: 12.9}, 2)
    assert "is here already" in text_of(room, 9)
    assert all(isinstance(status_of(room, connection, 13.0), Paired) for connection in ALL)


def test_one_whose_place_is_held_by_a_dead_one_gets_it() -> None:
    room = come(Room(), {1: TRAINERS[1], 9: replace(TRAINERS[1], pid=99)})
    room = lose(room, 1, DIED)
    assert "rank 0 of side 'trainer' (host a, process 11) waited here and died" in str(status_of(room, 9, 1.0))
    room = come(settle(room, 5.0, {9: 5.0}, 1), {2: TRAINERS[2], 3: SERVER})
    assert room.epoch is not None
    assert list(room.epoch.members) == [9, 2, 3]


def test_a_death_ends_the_epoch_and_is_named_to_everybody() -> None:
    room = lose(come(Room(), ALL), 3, DIED)
    for connection in (1, 2):
        found = status_of(room, connection, 1.0)
        assert found == Refused(
            "epoch 1 is over: rank 2, which is rank 0 of side 'server' (host b, process 13), died: its connection to "
            "the meeting closed; see its log",
            is_over=True,
        )
        assert over_reason(room, connection, 1) == found.text


def test_they_pair_anew_and_the_old_epoch_stays_over() -> None:
    room = lose(come(Room(), ALL), 3, DIED)
    room = come(room, {4: replace(SERVER, pid=44)}, now=1.0)
    waiting = status_of(room, 4, 3.0)
    assert waiting == Missing(2.0, (("trainer", 0), ("trainer", 1)), (("trainer", 0), ("trainer", 1)))
    assert "ranks 0, 1 of side 'trainer' are there and have not called renew()" in str(waiting)
    assert "rank 0 of side 'trainer' is there and has not called" in str(replace(waiting, busy=(("trainer", 0),)))
    room = come(room, TRAINERS, now=4.0)
    for connection in (1, 2, 4):
        assert status_of(room, connection, 4.0) == Paired(2, 2, SIDES, ("a", "a", "b"), {})
        assert "process 13), died" in str(over_reason(room, connection, 1))
        assert over_reason(room, connection, 2) is None
    assert over_reason(room, 3, 2) is not None
    assert "pair anew" in str(over_reason(room, 1, 77))


def test_a_fleet_that_grew_is_taken_as_it_says() -> None:
    room = lose(come(Room(), ALL), 3, DIED)
    grown = (("trainer", 0), ("server", 2))
    room = come(room, {5: replace(SERVER, sides=grown), 6: replace(SERVER, sides=grown, rank=1)})
    open_sides = (("trainer", 2), ("server", 0))
    room = come(room, {connection: replace(one, sides=open_sides) for connection, one in TRAINERS.items()})
    found = status_of(room, 1, 0.0)
    assert isinstance(found, Paired)
    assert (found.sides, found.number) == ((("trainer", 2), ("server", 2)), 2)


def test_a_member_that_joins_again_ends_the_epoch() -> None:
    room = come(come(Room(), ALL), {2: TRAINERS[2]})
    assert "rank 1, which is rank 1 of side 'trainer' (host a, process 12), pairs anew" in text_of(room, 1)
    room = come(room, {1: TRAINERS[1], 3: SERVER})
    assert all(isinstance(status_of(room, connection, 0.0), Paired) for connection in ALL)


def test_one_that_leaves_in_peace_ends_nothing_but_all_may_pair_anew() -> None:
    room = leave(come(Room(), ALL), 3)
    found = status_of(room, 1, 1.0)
    assert isinstance(found, Paired)
    assert "rank 0 of side 'server' (host b, process 13), has left epoch 1" in found.left[2]
    assert over_reason(room, 1, 1) is None, "what goes on may end well"
    room = lose(room, 3, DIED)
    assert isinstance(status_of(room, 1, 1.0), Paired), "it had left"
    room = come(room, {4: replace(SERVER, pid=44), **TRAINERS})
    assert isinstance(status_of(room, 4, 1.0), Paired)


def test_one_that_gives_up_is_not_counted_on() -> None:
    room = leave(come(Room(), TRAINERS), 2)
    room = come(room, {3: SERVER})
    assert status_of(room, 3, 1.0) == Missing(1.0, (("trainer", 1),))


def test_two_ranks_on_one_gpu_are_refused_by_name_with_nccl_alone() -> None:
    for backend, is_refused in (("nccl", True), ("gloo", False)):
        facts = (("backend", backend),)
        same = {c: replace(one, facts=facts, gpu=f"GPU-{c % 2}", machine="m") for c, one in ALL.items()}
        room = come(Room(), same)
        if is_refused:
            text = text_of(room, 1)
            assert "process 11) and rank 0 of side 'server' (host b, process 13) are both on GPU GPU-1" in text
            assert 'connect(..., device="cpu")' in text
        else:
            assert isinstance(status_of(room, 1, 0.0), Paired)
    apart = {c: replace(one, facts=(("backend", "nccl"),), gpu="GPU-0", machine=f"m{c}") for c, one in ALL.items()}
    found = status_of(come(Room(), apart), 1, 0.0)
    assert isinstance(found, Paired)
    assert found.hosts == ("a/m1", "a/m2", "b"), "hosts of one name are told apart"


def test_equal_ranks_do_not_differ() -> None:
    assert find_difference(TRAINERS[1], SERVER) == ""


EVENTS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "lose", "wait"]), st.integers(1, 6), st.integers(0, 2)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_whatever_happens_nobody_is_in_two_groups(events: list[tuple[str, int, int]]) -> None:
    """Epochs never change, serials never come again, and a live epoch has one connection in each place."""
    room, now, members, alive = Room(), 0.0, {}, set()
    for what, connection, which in events:
        now += 1.5
        if what == "join":
            room = join(room, connection, list(ALL.values())[which], now)
            alive.add(connection)
        elif what != "wait" and connection in alive:
            room = leave(room, connection) if what == "leave" else lose(room, connection, DIED)
            alive -= {connection} if what == "lose" else set()
        room = settle(room, now, dict.fromkeys(alive, now), len(members) + 1)
        epoch = room.epoch
        if epoch is not None:
            before = members.setdefault(epoch.serial, dict(epoch.members))
            assert before == epoch.members
            assert epoch.serial == len(members)
            assert [one.place for one in epoch.members.values()] == [("trainer", 0), ("trainer", 1), ("server", 0)]
            if epoch.is_live:
                assert epoch.members.keys() <= alive
                assert not epoch.members.keys() & room.waiting.keys()
        for one in alive:
            status_of(room, one, now)
