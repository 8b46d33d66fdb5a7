"""Ranks with links between all of them, as threads of this process: what is met by links, and what at the store."""

import itertools
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from tests.transport.coordination.test_rendezvous import at_once
from tricomm.transport.coordination import attendance
from tricomm.transport.coordination.intent import Agreed, Intent, describe_refusal
from tricomm.transport.coordination.monitor import Monitor
from tricomm.transport.coordination.rendezvous import Rendezvous
from tricomm.transport.coordination.status import StatusStore
from tricomm.transport.memory.link import Link
from tricomm.transport.memory.nearby import Nearby, digest_of
from tricomm.transport.memory.protocol import Here
from tricomm.transport.memory.rungs import Rung

TIMEOUT_SECONDS = 2.0


class CountingStore:
    """A store that counts what is asked of it, but for heartbeats."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self._store, name)

    @property
    def keys(self) -> int:
        return self._store.num_keys()


class Group:
    """Ranks with links between each two of them."""

    def __init__(self, size: int) -> None:
        self.store = CountingStore()
        self.links: list[dict[int, Link]] = [{} for _ in range(size)]
        for one, other in itertools.combinations(range(size), 2):
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for rank, peer, end in zip((one, other), (other, one), ends, strict=True):
                self.links[rank][peer] = Link(peer, end, os.getpid(), Rung.READ, Rung.READ)
        self.nears = [Nearby([*links.values()]) for links in self.links]
        self.ranks = [Rendezvous(self.store, rank, Monitor(StatusStore(self.store, rank)), {}) for rank in range(size)]
        self.everybody = tuple(range(size))

    def intent(self, what: str) -> Intent:
        return Intent(self.everybody, {"what": what}, what, "", f"call of {what}")

    def join(self, rank: int, what: str, *, by_links: bool = True, seconds: float = TIMEOUT_SECONDS) -> Agreed:
        near = self.nears[rank] if by_links else None
        return self.ranks[rank].join(self.intent(what), seconds, decide=str, near=near)

    def join_again(self, rank: int, what: str, *, seconds: float = TIMEOUT_SECONDS) -> Agreed:
        """As ``join``, by links if that comes about at once."""
        number = self.ranks[rank].join_by_links(self.intent(what), self.nears[rank])
        return Agreed(number, "False") if number else self.join(rank, what, seconds=seconds)

    def run(self, *calls: Callable[[int], Any]) -> list[Any]:
        """Run a call on each rank at once: what each returns, or the text of its TransportError."""
        return at_once(*map(partial, calls, range(len(calls))))

    def join_all(
        self, *whats: str, late: float = 0.0, at_store: Sequence[int] = (), again: Sequence[int] = ()
    ) -> list[Any]:
        """Each rank comes to do its thing, the last one some seconds late; some as in the call before."""

        def come(rank: int) -> Agreed:
            if rank == len(whats) - 1:
                time.sleep(late)
            if rank in again:
                return self.join_again(rank, whats[rank])
            return self.join(rank, whats[rank], by_links=rank not in at_store)

        return self.run(*[come] * len(whats))


def test_ranks_that_do_the_same_meet_without_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "PATIENCE_SECONDS", TIMEOUT_SECONDS)
    group = Group(4)
    asked = group.store.asked
    for number in range(1, 20):
        assert group.join_all(*[f"call {number}"] * 4) == [Agreed(number, "False")] * 4
    assert group.store.asked == asked


def test_a_rank_that_is_late_finds_the_others_by_links_and_nothing_stays_on_the_store() -> None:
    group = Group(3)
    for number in range(1, 4):
        assert group.join_all("a", "a", "a", late=0.3) == [Agreed(number, "False")] * 3
    assert group.join_all("a", "a", "a") == [Agreed(4, "False")] * 3
    assert group.store.keys <= 3 + 3, "notes and heartbeats, one a rank"


def test_what_is_left_at_the_store_stays_bounded() -> None:
    group, choose = Group(3), random.Random(2)
    for _ in range(30):
        late, at_store = choose.choice([0.0, 0.0, 0.15]), choose.choice([(), (0,), (0, 1, 2)])
        group.join_all("a", "a", "a", late=late, at_store=at_store)
    assert group.store.keys <= 3 + 3 + 2 * 4, "notes and heartbeats, one a rank; and of two calls at most"


@pytest.mark.parametrize("at_store", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_ranks_of_which_some_go_to_the_store_at_once_meet_there(at_store: tuple[int, ...]) -> None:
    group = Group(3)
    for number in range(1, 4):
        assert group.join_all("a", "a", "a", at_store=at_store) == [Agreed(number, "False")] * 3
    assert group.join_all("a", "a", "a") == [Agreed(4, "False")] * 3


@pytest.mark.parametrize("at_store", [(), (1,), (0, 2)])
def test_a_mismatch_names_both_calls_and_the_next_call_is_met_by_links(at_store: tuple[int, ...]) -> None:
    group = Group(3)
    assert group.join_all("a", "a", "a") == [Agreed(1, "False")] * 3
    for text in group.join_all("a", "b", "a", at_store=at_store):
        assert text.startswith("rank 1 disagrees with rank 0 about what: rank 0 says a, rank 1 says b")
        assert "(rank 0 makes call of a, rank 1 call of b)" in text
    # What was told of the call that failed is not taken for the next one.
    assert group.join_all("b", "b", "b") == [Agreed(3, "False")] * 3


def test_a_refusal_and_an_absence_are_told_to_who_waits_at_links() -> None:
    group = Group(3)
    refusal = describe_refusal(2, "SpecError: no")
    joins: list[Callable[[int], Any]] = [lambda rank: group.join(rank, "a")] * 2
    assert group.run(*joins, lambda rank: group.ranks[rank].abort(group.everybody, refusal)) == [refusal, refusal, None]
    texts = group.run(*joins)
    assert all(text.startswith("rank 2 did not call within the timeout") for text in texts), texts
    # They have told by links before, so who comes late meets them: its call fails, as they have said there.
    assert group.run(lambda _: group.join(2, "a")) == [Agreed(2, "False")]
    assert group.join_all("a", "a", "a") == [Agreed(3, "False")] * 3


def test_what_was_told_before_a_link_ends_counts() -> None:
    group = Group(3)
    group.nears[2].tell(1, "a")

    group.nears[0].tell(1, "a")
    group.nears[1].tell(1, "a")
    for link in group.links[2].values():
        link.close()
    assert [near.wait(1.0) for near in group.nears[:2]] == [True, True]


def test_who_did_not_hear_of_a_rank_that_died_gives_up_when_those_who_did_have_failed() -> None:
    """Rank 2 dies when it has told rank 1 and not rank 0: rank 1 begins the call, and fails there."""
    group = Group(3)
    group.links[2][1].tell(Here(1, digest_of("a")))
    group.nears[1].tell(1, "a")
    for link in group.links[2].values():
        link.close()
    reasons: list[str] = []
    group.nears[0].find_failed = lambda number: reasons[0] if reasons else None

    def call(rank: int) -> None:
        assert group.nears[rank].wait(5.0)
        time.sleep(0.3)
        reasons.append("rank 2 died in call of a")

    began = time.monotonic()
    assert group.run(lambda rank: group.join(rank, "a", seconds=30.0), call) == ["rank 2 died in call of a", None]
    assert time.monotonic() - began < 20.0, "not at the deadline"


@pytest.mark.parametrize("share_again", [0.0, 0.5, 1.0])
def test_random_calls_are_met_by_all_or_by_nobody(share_again: float) -> None:
    """Ranks are late, go to the store, or mean something else; each outcome is the same on all ranks."""
    choose, group = random.Random(1), Group(3)
    met = 0
    for number in range(1, 31):
        whats = ["a"] * 3
        if choose.random() < 0.2:
            whats[choose.randrange(3)] = "b"
        at_store = [rank for rank in range(3) if choose.random() < 0.2]
        again = [rank for rank in range(3) if choose.random() < share_again and rank not in at_store]
        late = choose.choice([0.0, 0.0, 0.0, 0.09, 0.11, 0.2, 0.25])
        results = group.join_all(*whats, late=late, at_store=at_store, again=again)
        if len({*whats}) == 1:
            assert results == [Agreed(number, "False")] * 3
            met += 1
        else:
            assert all("disagrees" in text for text in results)
    assert met > 10


def test_ranks_meet_again_without_the_store_and_one_that_is_late_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "PATIENCE_SECONDS", TIMEOUT_SECONDS)
    group = Group(4)
    asked = group.store.asked
    for number in range(1, 20):
        again = range(number % 5)
        late = 0.2 if number == 7 else 0.0
        assert group.join_all(*["a"] * 4, late=late, again=again) == [Agreed(number, "False")] * 4
    assert group.store.asked == asked


def test_what_is_to_be_settled_is_not_left_out() -> None:
    group = Group(3)
    refusal = describe_refusal(2, "SpecError: no")

    def refuse(rank: int) -> None:
        group.ranks[rank].abort(group.everybody, refusal)

    assert group.run(*[lambda rank: group.join_again(rank, "a")] * 2, refuse) == [refusal, refusal, None]
    for number in (2, 3):
        assert group.join_all("a", "a", "a", again=(0, 1, 2)) == [Agreed(number, "False")] * 3
    notes = group.ranks[2]._notes.of_channels[""]
    assert not notes.is_awaited_refusal, "nobody waits for a rank that has come again"
    dead = group.ranks[0]._dead
    dead[1] = "rank 1 died"
    assert group.join_all("a", "a", "a", again=(0, 1, 2)) == [Agreed(4, "False")] * 3
    assert not dead
    assert group.join_all("a", "a", "a", late=0.3) == [Agreed(5, "False")] * 3, "some leave keys at the store"
    assert group.join_all("a", "a", "a", again=(0, 1, 2)) == [Agreed(6, "False")] * 3
    assert group.store.keys <= 3 + 3, "notes and heartbeats, one a rank"


@pytest.mark.parametrize("where", ["send", "wait"])
def test_an_interrupt_while_ranks_meet_again_leaves_the_epoch_to_be_ended(where: str) -> None:
    """Whoever is interrupted knows at which epoch others may have met it, and its next word there ends that."""
    group = Group(2)
    assert group.join_all("a", "a", again=(0, 1)) == [Agreed(1, "False")] * 2

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    link = group.links[1][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "say" if where == "send" else "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            group.join_again(1, "a")
    assert group.nears[1].number == 2
    group.ranks[1].abort(group.everybody, "rank 1 was interrupted")
    if where == "send":
        assert group.run(lambda rank: group.join_again(rank, "a")) == ["rank 1 was interrupted"]
    else:
        assert group.join_again(0, "a") == Agreed(2, "False"), "it has met, and fails in the call"
    assert group.join_all("a", "a", again=(0, 1)) == [Agreed(3, "False")] * 2
