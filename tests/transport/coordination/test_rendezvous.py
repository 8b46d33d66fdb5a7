"""Ranks at a rendezvous, as threads on one store: what they agree on, and how they come together again."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from tricomm import TransportError
from tricomm.transport.coordination.identity import NUMBER, Identity
from tricomm.transport.coordination.intent import Agreed, Intent, ProblemError, describe_refusal
from tricomm.transport.coordination.monitor import Monitor
from tricomm.transport.coordination.rendezvous import Rendezvous
from tricomm.transport.coordination.status import StatusStore

TIMEOUT_SECONDS = 1.5


def intent(what: str, participants: tuple[int, ...] = (0, 1), channel: str = "") -> Intent:
    return Intent(participants, {"what": what}, what, channel, f"call of {what}")


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns on a thread of its own, or the text of its TransportError."""
    results: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            results[index] = calls[index]()
        except TransportError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Group:
    """Ranks that share a store and no process."""

    def __init__(self, size: int) -> None:
        store = dist.HashStore()
        self.dead: list[dict[int, str]] = [{} for _ in range(size)]
        self.ranks = [
            Rendezvous(store, rank, Monitor(StatusStore(store, rank)), self.dead[rank]) for rank in range(size)
        ]
        self.store = store

    def run(self, *calls: Callable[[Rendezvous], Any]) -> list[Any]:
        """Run a call on each rank at once: what each returns, or the text of its TransportError."""
        return at_once(*map(partial, calls, self.ranks))


def joining(what: str, **options: Any) -> Callable[[Rendezvous], Agreed]:
    return lambda rendezvous: rendezvous.join(intent(what), TIMEOUT_SECONDS, **options)


def after(seconds: float, call: Callable[[Rendezvous], Any]) -> Callable[[Rendezvous], Any]:
    def later(rendezvous: Rendezvous) -> Any:
        time.sleep(seconds)
        return call(rendezvous)

    return later


def test_ranks_that_do_the_same_agree_on_its_number_and_on_what_the_last_one_decides() -> None:
    group = Group(2)
    assert group.run(joining("a"), joining("a", decide=str)) in ([Agreed(1, "")] * 2, [Agreed(1, "False")] * 2)
    told = [joining("a", needs_reconnect=True, decide=str), joining("a", decide=str)]
    assert group.run(*told) == [Agreed(2, "True")] * 2
    assert group.run(joining("a", decide=str), after(0.3, joining("a", decide=str))) == [Agreed(3, "False")] * 2


def test_keys_of_the_epoch_before_are_deleted() -> None:
    group = Group(2)
    for _ in range(5):
        group.run(joining("a", needs_reconnect=True), joining("a"))
    held = group.store.num_keys()
    for _ in range(5):
        group.run(joining("a", needs_reconnect=True), joining("a"))
    assert group.store.num_keys() <= held + 2  # notes and heartbeats, one a rank


def test_a_mismatch_names_both_calls_and_the_next_call_works() -> None:
    group = Group(2)
    for text in group.run(joining("a"), joining("b")):
        assert text.startswith("rank 1 disagrees with rank 0 about what: rank 0 says a, rank 1 says b")
        assert "(rank 0 makes call of a, rank 1 call of b)" in text
    assert group.run(joining("a"), joining("a")) == [Agreed(2, "")] * 2


def test_a_rank_that_refuses_tells_the_others_and_its_next_call_is_met() -> None:
    group = Group(2)
    refusal = describe_refusal(1, "SpecError: no")
    assert group.run(joining("a"), lambda one: one.abort((0, 1), refusal)) == [refusal, None]
    assert group.run(joining("a"), joining("a")) == [Agreed(2, "")] * 2
    # Before the others come, too; and for all ranks, when it is not known who takes part.
    group.ranks[1].abort((0, 1), refusal)
    assert group.run(joining("a")) == [refusal]
    group.ranks[1].abort((0, 1, 2), refusal)
    assert group.run(joining("a")) == [refusal]
    assert group.run(joining("a"), joining("a"))[0] == Agreed(5, "")


def test_a_refusal_is_settled_once_the_ranks_have_met() -> None:
    """Whoever refused a call and has made it since is not said to refuse another one, in which it is slow."""
    group = Group(3)
    everybody, pair = intent("all", (0, 1, 2)), intent("a")

    def meet(rendezvous: Rendezvous, what: Intent = everybody) -> Agreed:
        return rendezvous.join(what, TIMEOUT_SECONDS)

    refusal = describe_refusal(1, "SpecError: no")
    group.ranks[1].abort((0, 1), refusal, audience=(0, 1, 2))
    assert group.run(joining("a")) == [refusal]
    assert group.run(joining("a"), joining("a"))[0] == Agreed(2, "")
    assert group.run(meet, after(0.5, meet), meet) == [Agreed(1, "")] * 3
    # Of a call that nobody else knows: whoever has met the rank since knows that it goes on.
    group.ranks[1].abort((1,), refusal, audience=(0, 1, 2))

    def told_and_again(rendezvous: Rendezvous) -> Agreed:
        with pytest.raises(TransportError, match="SpecError: no"):
            meet(rendezvous, pair)
        return meet(rendezvous, pair)

    assert group.run(told_and_again, after(0.5, lambda one: meet(one, pair))) == [Agreed(4, "")] * 2
    assert group.run(lambda one: meet(one, pair), after(0.5, lambda one: meet(one, pair))) == [Agreed(5, "")] * 2
    assert group.run(meet, after(0.5, meet), meet)[2] == refusal, "rank 2 has not met it"


def test_an_absent_rank_is_named_and_told_when_it_comes() -> None:
    group = Group(2)
    began = time.monotonic()
    (text,) = group.run(joining("a"))
    assert text.startswith("rank 1 did not call within the timeout")
    assert 0.9 * TIMEOUT_SECONDS < time.monotonic() - began <= TIMEOUT_SECONDS
    with pytest.raises(TransportError, match="rank 1 did not call"):
        group.ranks[1].join(intent("a"), TIMEOUT_SECONDS)
    assert group.run(joining("a"), joining("a")) == [Agreed(2, "")] * 2


def test_a_rank_that_left_out_a_call_of_another_kind_goes_on_to_the_next_one() -> None:
    group = Group(2)
    for what in ("a", "b"):
        (text,) = group.run(joining(what))
        assert text.startswith("rank 1 did not call within the timeout")
    assert group.run(joining("c"), joining("c")) == [Agreed(3, "")] * 2


def counting(number: int) -> Callable[[Rendezvous], Any]:
    """A call of a thing that counts; True if it is to be counted anew."""

    def call(rendezvous: Rendezvous) -> Any:
        fields = {"what": "a", "call": str(number)}
        try:
            rendezvous.join(Intent((0, 1), fields, f"a{number}", "", "a call", "call", "a"), TIMEOUT_SECONDS)
        except TransportError as error:
            return isinstance(error.__cause__, ProblemError) and error.__cause__.counts_anew
        return "met"

    return call


def test_what_only_counts_differ_about_is_counted_anew() -> None:
    group = Group(2)
    assert group.run(counting(1), counting(1)) == ["met"] * 2
    assert group.run(counting(2), counting(3)) == [True, True]
    assert group.run(counting(1), counting(1)) == ["met"] * 2
    first, other = group.run(counting(2), joining("b"))
    assert first is False
    assert "disagrees" in other


def test_who_catches_up_counts_anew_with_all_others() -> None:
    group = Group(2)
    for number in (1, 2):
        assert group.run(counting(number)) == [False]
    group.ranks[1].note_late((0, 1), "")
    assert group.run(counting(3), after(0.3, counting(1))) == [True, True]
    assert group.run(counting(1), counting(1)) == ["met"] * 2


def test_a_rank_that_is_a_call_behind_catches_up() -> None:
    group = Group(2)
    for _ in range(2):
        group.run(joining("a"))
    first = group.run(joining("a"), joining("a"))
    assert "rank 1 did not call" in first[1]
    assert "rank 1 is one call behind" in first[0] or "rank 1 did not call" in first[0]
    second = group.run(joining("a"), joining("a"))
    third = group.run(joining("a"), joining("a"))
    assert isinstance(third[0], Agreed), (first, second, third)
    assert third[0] == third[1]


def test_an_exception_at_a_rendezvous_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(2)

    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    def call(rendezvous: Rendezvous) -> Any:
        with pytest.raises(KeyboardInterrupt):
            rendezvous.join(intent("a"), TIMEOUT_SECONDS)

    monkeypatch.setattr(group.ranks[1], "_attend", interrupted)
    began = time.monotonic()
    assert group.run(joining("a"), call)[0] == "rank 1 failed in call of a: KeyboardInterrupt()"
    assert time.monotonic() - began < TIMEOUT_SECONDS / 2
    monkeypatch.undo()
    assert group.run(joining("a"), joining("a")) == [Agreed(2, "")] * 2


EVERYBODY = (0, 1, 2)


def all_joining(what: str, *reasons: str) -> Callable[[Rendezvous], Any]:
    """Join with all three; ``reasons`` why not are looked at one after the other, the last one ever after."""
    ahead = list(reasons) or [""]

    def given_up() -> str:
        return ahead.pop(0) if ahead[1:] else ahead[0]

    return lambda one: at_once(lambda: one.join(intent(what, EVERYBODY), TIMEOUT_SECONDS, given_up=given_up))[0]


def test_who_gives_a_call_up_tells_those_who_make_it_and_nobody_else() -> None:
    group = Group(3)

    def both(*calls: Callable[[Rendezvous], Any]) -> Callable[[Rendezvous], Any]:
        return lambda one: [call(one) for call in calls]

    # Rank 2 has left that call out, and comes to the next one of all.
    gives_up = all_joining("a", "", "", "rank 1 gave it up")
    calls = both(all_joining("a"), all_joining("b")), both(gives_up, all_joining("b")), all_joining("b")
    told = ["rank 1 gave it up", Agreed(2, "")]
    assert group.run(*calls) == [told, told, told[1]]
    # The last to come does so too, and before it comes.
    assert group.run(*[all_joining("a")] * 2, after(0.3, all_joining("a", "no"))) == ["no"] * 3
    assert group.run(*[all_joining("a")] * 3) == [Agreed(4, "")] * 3


def test_what_a_rank_was_told_elsewhere_it_does_not_hear_at_the_rendezvous_once_more() -> None:
    """As of ranks that wait in a call for those who miss them at a rendezvous: one verdict ends both."""
    group = Group(3)
    group.ranks[0].abort(EVERYBODY, "rank 0 makes another call")
    for number in (group.ranks[0].number_of(EVERYBODY, ""), 0):  # and of one long ago
        group.ranks[1].pass_by(EVERYBODY, "", number)
    assert all_joining("a")(group.ranks[2]) == "rank 0 makes another call"
    assert group.run(*[all_joining("a")] * 3) == [Agreed(2, "")] * 3


def test_a_refusal_of_a_later_call_ends_what_the_rank_waits_in_on_another_thread() -> None:
    """It does not go on to wait for others in a call that these have heard to be over."""
    group = Group(3)
    alone: list[Any] = []
    waiting = threading.Thread(target=lambda: alone.append(all_joining("a")(group.ranks[1])))
    waiting.start()
    time.sleep(0.3)
    group.ranks[1].abort(EVERYBODY, "rank 1 refused the next call")
    assert all_joining("a")(group.ranks[0]) == "rank 1 refused the next call"
    waiting.join()
    assert alone == ["rank 1 refused the next call"]
    assert all_joining("a")(group.ranks[2]) == "rank 1 refused the next call"
    assert group.run(*[all_joining("a")] * 3) == [Agreed(3, "")] * 3


def test_channels_do_not_disturb_each_other() -> None:
    """One thread of each rank waits on a channel for long while two others meet on another, again and again."""
    group = Group(2)
    slow = intent("slow", channel="slow")
    waiting = threading.Thread(target=lambda: group.ranks[0].join(slow, 5.0))
    waiting.start()
    for _ in range(3):
        assert isinstance(group.run(joining("a"), after(0.25, joining("a")))[0], Agreed)
    assert isinstance(group.ranks[1].join(slow, 5.0), Agreed)
    waiting.join()


def test_ranks_that_name_different_channels_are_told_both() -> None:
    group = Group(2)
    other = lambda one: one.join(intent("a", channel="b"), TIMEOUT_SECONDS)  # noqa: E731
    first, second = group.run(joining("a"), other)
    about = "in call of a on {}, and is missed on {}; give the same channel= on all ranks"
    assert about.format("channel 'b'", "the shared channel") in first, first
    assert about.format("the shared channel", "channel 'b'") in second, second
    assert any(isinstance(group.run(joining("a"), joining("a"))[0], Agreed) for _ in range(3)), "as after any absence"


def test_who_has_made_another_number_of_unnamed_resharders_is_told_to_name_them() -> None:
    group, counts = Group(2), [Counter[str](), Counter[str]()]

    def connecting(rank: int) -> Callable[[Rendezvous], Any]:
        made = Identity(Counts(counts[rank]), {"layout": "rows"}, f"Resharder {NUMBER} of rows", is_counted=True)
        return lambda rendezvous: rendezvous.join(made.intent((0, 1), "", 0, {}), TIMEOUT_SECONDS)

    connecting(1)  # nobody else makes it
    for text in group.run(connecting(0), connecting(1)):
        assert "rank 0 says number 1, rank 1 says number 2" in text, text
        assert "a name=... of its own for each needs no counting" in text, text


class Counts:
    """See identity.Counts."""

    def __init__(self, made: Counter[str]) -> None:
        self.made = made

    def count(self, digest: str) -> int:
        self.made[digest] += 1
        return self.made[digest]

    def uncount(self, digest: str, number: int) -> None:
        self.made[digest] -= 1


def test_a_dead_rank_is_not_waited_for_and_may_come_back() -> None:
    group = Group(2)
    group.dead[0][1] = "rank 1 died: its connection closed"
    began = time.monotonic()
    text = group.run(lambda one: one.join(intent("a"), 20.0))[0]
    assert text.startswith("rank 1 died: its connection closed; it did not come back")
    assert time.monotonic() - began < 4
    with pytest.raises(TransportError):
        group.ranks[1].join(intent("a"), TIMEOUT_SECONDS)
    assert isinstance(group.run(joining("a"), joining("a"))[0], Agreed)
    assert group.dead[0] == {}


def test_abort_awaited_ends_what_others_wait_in_and_nothing_else() -> None:
    group = Group(2)
    assert group.run(joining("a"), after(0.2, lambda one: one.abort_awaited((0, 1), "rank 1 closed it"))) == [
        "rank 1 closed it",
        None,
    ]
    group.ranks[1].abort_awaited((0, 1), "rank 1 closed it")
    assert isinstance(group.run(joining("a"), joining("a"))[0], Agreed)
