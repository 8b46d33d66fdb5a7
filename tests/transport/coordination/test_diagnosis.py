"""Who is at fault for a wait that took too long: found from what ranks say of themselves, without any process."""

from collections.abc import Mapping

import pytest

from tricomm.transport.coordination.diagnosis import (
    Observations,
    describe_missed,
    diagnose,
    diagnose_connecting,
    find_other_order,
    reachable,
)
from tricomm.transport.coordination.status import Heartbeat, Wait


def found(
    here: Mapping[int, int], elsewhere: Mapping[int, tuple[int, ...]], silent: set[int], calls: Mapping[int, str]
) -> str:
    """What rank 0 finds, who waits for rank 1; ranks wait here for one (itself: for none), and elsewhere for more."""
    heartbeats = {}
    for rank in range(8):
        waits = [Wait(f"link to {peer}", peer, "call 1 of link") for peer in elsewhere.get(rank, ())]
        if rank in here:
            peer = None if here[rank] == rank else here[rank]
            waits.append(Wait("place", peer, f"call 1 of {calls.get(rank, 'a')}"))
        heartbeats[rank] = Heartbeat(1, tuple(waits))
    mine = Wait("place", 1, "call 1 of a")
    assert set(reachable(0, [1], heartbeats)) <= set(range(8))
    return diagnose(0, mine, heartbeats, silent).text


@pytest.mark.parametrize(
    ("here", "elsewhere", "silent", "text"),
    [
        ({}, {}, {1}, "rank 1 gave no sign of life"),
        ({1: 2}, {1: (2,)}, {2}, "rank 2 gave no sign of life"),
        ({1: 2, 2: 3}, {1: (2,), 2: (3,), 3: (1,)}, {3}, "rank 3 gave no sign of life"),
        ({}, {1: (0, 2), 2: (1, 3)}, {3}, "rank 3 gave no sign of life"),  # each in places of its own
        ({1: 2}, {1: (2,), 2: (0, 3), 3: (2, 4), 4: (5,)}, {4, 5}, "rank 4 gave no sign of life"),
        ({}, {1: (0, 2), 2: (1, 0)}, set(), "rank 1 is alive but did not send"),
        ({1: 1}, {1: ()}, set(), "rank 1 is alive but did not send"),
        ({1: 2, 2: 1}, {1: (2,), 2: (1,)}, set(), "ranks [1, 2] wait for each other"),
        ({1: 0}, {}, set(), "ranks [0, 1] wait for each other"),
    ],
)
def test_the_rank_that_says_nothing_is_found_through_all_places(
    here: dict[int, int], elsewhere: dict[int, tuple[int, ...]], silent: set[int], text: str
) -> None:
    assert found(here, elsewhere, silent, {}).startswith(text)


def test_ranks_that_wait_for_each_other_in_different_calls_are_told_both() -> None:
    text = found({1: 2, 2: 0}, {}, set(), {2: "b"})
    assert text == (
        "rank 0 waits for rank 1 in call 1 of a, and rank 1 for rank 2 in call 1 of a, and rank 2 for rank 0 in call 1 "
        "of b; every rank must make the same calls in the same order"
    )


def test_a_rank_that_waits_in_another_place_is_told_with_its_call() -> None:
    text = found({}, {1: (0,)}, set(), {})
    assert "rank 1 is alive" in text
    assert "(rank 0 waited for rank 1 in call 1 of a, and rank 1 is in call 1 of link)" in text


def test_who_does_not_connect_is_named() -> None:
    text, late = diagnose_connecting(0, "call 1 of a", (0, 1, 2), {2})
    assert text.startswith("rank 2 gave no sign of life")
    assert late == 2
    text, late = diagnose_connecting(0, "call 1 of a", (0, 1, 2), set())
    assert "did not connect within the timeout" in text
    assert late is None


def test_a_rank_that_computes_is_found_through_those_that_wait_for_it() -> None:
    """Rank 1 waits elsewhere for rank 2, which computes, and what rank 2 has posted meanwhile keeps it from nothing."""
    heartbeats = {
        1: Heartbeat(1, (Wait("link to 2", 2, "call 1 of link"),)),
        2: Heartbeat(1, (Wait("", None, "the computation of 2F3"), Wait("link to 1", None, "call 2 of link"))),
    }
    text, late = diagnose(0, Wait("place", 1, "call 1 of a"), heartbeats, set())
    assert late == 2
    assert text.startswith("rank 2 is alive but did not send or receive within the timeout")
    assert "(rank 0 waited for rank 1 in call 1 of a, and rank 2 is in the computation of 2F3)" in text


class Status:
    """Heartbeats that a test sets."""

    rank = 0

    def __init__(self) -> None:
        self.heartbeats: dict[int, Heartbeat] = {}

    def heartbeat_of(self, rank: int) -> Heartbeat:
        return self.heartbeats[rank]


def test_a_heartbeat_that_stays_the_same_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status()
    monkeypatch.setattr("tricomm.transport.coordination.diagnosis.StatusStore", Status)
    observations = Observations(status)
    status.heartbeats = {1: Heartbeat(1, (Wait("place", 2, ""),)), 2: Heartbeat(7, ())}
    assert set(observations.look([1], 10.0)) == {1, 2}
    assert observations.silent([1, 2], 11.0, 1.5) == set()
    status.heartbeats[1] = Heartbeat(2, status.heartbeats[1].waits)
    observations.look([1], 12.0)
    assert observations.silent([1, 2], 12.0, 1.5) == {2}
    observations.clear()
    observations.look([1], 13.0)
    assert observations.silent([1, 2], 13.0, 1.5) == set()


def waiting(peer: int | None, call: str, position: int, place: str = "link") -> Heartbeat:
    return Heartbeat(1, (Wait(place, peer, call, (), position),))


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({1: waiting(0, "call 1 of b", 5)}, True),
        ({1: waiting(2, "call 1 of b", 5), 2: waiting(0, "call 3 of a", 5)}, True),
        ({1: waiting(0, "call 1 of b", 6)}, False),  # it is ahead: what this rank waits for is under way
        ({1: waiting(0, "call 3 of a", 5)}, False),  # the same call
        ({1: waiting(2, "call 1 of b", 5), 2: waiting(None, "call 1 of b", 5)}, False),  # rank 2 is at work
        ({1: waiting(2, "call 1 of b", 5), 2: waiting(1, "call 1 of c", 5)}, False),  # others find that
        ({1: waiting(0, "call 1 of b", 5, "another link")}, False),
        ({1: Heartbeat(0, ())}, False),
    ],
)
def test_calls_in_another_order_are_found_before_the_deadline(theirs: dict[int, Heartbeat], told: bool) -> None:
    mine = Wait("link", 1, "call 3 of a", (), 5)
    text = find_other_order(0, mine, theirs.__getitem__)
    assert (text is not None) == told
    if text is not None:
        assert "in call 3 of a" in text
        assert "in call 1 of b" in text


@pytest.mark.parametrize(
    ("heartbeat", "told"),
    [
        (waiting(0, "call 3 of a", 6), True),
        (waiting(1, "call 3 of a", 6), True),
        (waiting(0, "call 3 of a", 5), False),  # that call is over here, and what it waits for is under way
        (waiting(3, "call 3 of a", 6), False),  # one that is not here either
        (waiting(0, "call 3 of a", 6, "another link"), False),
    ],
)
def test_a_rank_that_misses_a_rendezvous_in_another_call_is_found(heartbeat: Heartbeat, told: bool) -> None:
    text = describe_missed(0, "call 1 of b", 5, "link", 2, heartbeat, [0, 1])
    assert (text is not None) == told
    if text is not None:
        assert text.startswith("rank 2 waits for rank ")
        assert "and rank 0 for rank 2 in call 1 of b" in text
