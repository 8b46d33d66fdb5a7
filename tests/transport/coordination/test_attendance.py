"""Every transition of a rank at a rendezvous, without a store and without a clock."""

from dataclasses import replace

import pytest

from tricomm.transport.coordination.attendance import (
    DEAD_SECONDS,
    MISMATCH_SECONDS,
    PATIENCE_SECONDS,
    Abort,
    Announce,
    Arrive,
    CallEpoch,
    Decide,
    Look,
    Meet,
    Note,
    Phase,
    Return,
    State,
    Terms,
    View,
    advance,
    describe_absence,
)

EPOCH = CallEpoch("ranks", 3)
TERMS = Terms(EPOCH, (0, 1, 2), arrived=100.0, deadline=110.0, dead={})
TOLD = State(Phase.TOLD)
ARRIVED = State()
ANNOUNCED = State(Phase.ANNOUNCED)


def note(rank: int = 0, **changes: object) -> Note:
    told = Note(EPOCH, ((0, 2, 1),), "", f"call 3 of Resharder {rank}", "S0", fields={"layout": "S0"})
    return told._replace(**changes)


ALIKE = {rank: note(rank) for rank in (0, 1, 2)}


@pytest.mark.parametrize("state", [TOLD, ARRIVED, ANNOUNCED])
@pytest.mark.parametrize("view", [View(100.0), View(100.0, is_last=True), View(111.0, "problem"), View(111.0)])
def test_ranks_that_have_told_the_same_by_links_have_met_wherever_one_of_them_is(state: State, view: View) -> None:
    assert advance(state, replace(view, have_told=True), TERMS) == (state, Meet())


def test_who_is_at_the_store_gives_up_when_those_who_have_met_by_links_have_failed() -> None:
    for state in (ARRIVED, ANNOUNCED):
        assert advance(state, View(100.0, failed="lost"), TERMS) == (state, Abort("lost", None, (EPOCH,)))


def test_who_gives_its_call_up_ends_the_rendezvous_unless_it_has_come_about() -> None:
    given_up = Abort("no more", None, (EPOCH,), is_given_up=True)
    for state in (ARRIVED, ANNOUNCED):
        for view in (View(100.0), View(100.0, is_last=True), View(111.0), View(100.0, notes=ALIKE)):
            assert advance(state, replace(view, given_up="no more"), TERMS) == (state, given_up)
        assert advance(state, View(100.0, "problem", given_up="no more"), TERMS) == (state, Return("problem"))
        assert advance(state, View(100.0, have_told=True, given_up="no more"), TERMS) == (state, Meet())


def test_who_waits_at_links_goes_to_the_store_when_that_is_in_vain_or_takes_long() -> None:
    state, action = advance(TOLD, View(100.04), TERMS)
    assert (state, action) == (TOLD, Look(pytest.approx(PATIENCE_SECONDS - 0.04)))
    assert advance(TOLD, View(100.04, is_in_vain=True), TERMS) == (ARRIVED, Arrive())
    assert advance(TOLD, View(100.0 + PATIENCE_SECONDS), TERMS) == (ARRIVED, Arrive())
    assert advance(TOLD, View(100.01), replace(TERMS, deadline=100.01)) == (ARRIVED, Arrive())


def test_at_the_store_it_does_not_matter_that_links_are_in_vain() -> None:
    assert advance(ARRIVED, View(100.0, is_last=True, is_in_vain=True), TERMS) == (ARRIVED, Decide())
    assert advance(ARRIVED, View(100.04, is_in_vain=True), TERMS)[1] == Look(pytest.approx(PATIENCE_SECONDS - 0.04))


def test_the_last_to_arrive_decides() -> None:
    assert advance(ARRIVED, View(100.0, is_last=True), TERMS) == (ARRIVED, Decide())


@pytest.mark.parametrize("state", [ARRIVED, ANNOUNCED])
def test_an_outcome_ends_the_waiting(state: State) -> None:
    assert advance(state, View(100.0, "done 7"), TERMS) == (state, Return("done 7"))


def test_a_rank_is_patient_before_it_tells_what_it_does() -> None:
    state, action = advance(ARRIVED, View(100.04), TERMS)
    assert state == ARRIVED
    assert action == Look(pytest.approx(PATIENCE_SECONDS - 0.04))
    assert advance(ARRIVED, View(100.0 + PATIENCE_SECONDS), TERMS) == (ANNOUNCED, Announce())


def test_with_a_short_timeout_it_is_less_patient() -> None:
    terms = replace(TERMS, deadline=100.01)
    assert advance(ARRIVED, View(100.01), terms) == (ANNOUNCED, Announce())


def test_it_looks_again_until_the_deadline() -> None:
    some = {0: note(0), 1: note(1)}
    assert advance(ANNOUNCED, View(105.0, notes=some), TERMS) == (ANNOUNCED, Look(PATIENCE_SECONDS))
    assert advance(ANNOUNCED, View(109.96, notes=some), TERMS)[1] == Look(pytest.approx(0.04))


def test_at_the_deadline_the_absent_are_named_with_what_they_do() -> None:
    _, action = advance(ANNOUNCED, View(110.0, notes={0: note(0)}, elsewhere={2: "call 1 of b"}), TERMS)
    assert isinstance(action, Abort)
    assert action.absent == (1, 2)
    assert action.epochs == (EPOCH,)
    assert not action.is_mismatch
    assert action.text.startswith("rank 1 did not call within the timeout (nor did [2])")
    assert "rank 2 is in call 1 of b" in action.text


def test_if_all_came_and_nobody_decided_the_timeout_was_too_short() -> None:
    _, action = advance(ANNOUNCED, View(110.0, notes=ALIKE), TERMS)
    assert isinstance(action, Abort)
    assert action.text == describe_absence((), (0, 1, 2), {})
    assert action.text.endswith("raise the timeout")


def test_a_mismatch_is_told_at_once_if_all_are_there() -> None:
    notes = {**ALIKE, 2: note(2, fields={"layout": "S1"}, epoch=CallEpoch("ranks", 4))}
    _, action = advance(ANNOUNCED, View(101.0, notes=notes), TERMS)
    assert isinstance(action, Abort)
    assert action.is_mismatch
    assert action.refused_by is None
    assert action.epochs == (EPOCH, CallEpoch("ranks", 4)), "the epochs that clash end too"
    assert action.text == (
        "rank 2 disagrees with rank 0 about layout: rank 0 says S0, rank 2 says S1; every rank must make the same "
        "calls in the same order (rank 0 makes call 3 of Resharder 0, rank 2 call 3 of Resharder 2)"
    )


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ("y\n", "y\0", r"rank 0 says 'y\n', rank 2 says 'y\x00';"),
        ("", "keys", "rank 0 says '', rank 2 says keys;"),
        (f"{'a8b7' * 16}/4", f"{'0d3c' * 16}/11", "rank 0 says a8b7a8b7/4, rank 2 says 0d3c0d3c/11;"),
    ],
)
def test_what_would_break_a_line_or_says_nothing_is_told_so_that_it_can_be_read(
    one: str, other: str, told: str
) -> None:
    notes = {rank: note(rank, fields={"name": other if rank == 2 else one}) for rank in range(3)}
    _, action = advance(ANNOUNCED, View(101.0, notes=notes), TERMS)
    assert isinstance(action, Abort)
    assert told in action.text


def test_a_mismatch_waits_a_little_for_the_others_so_that_the_first_is_named() -> None:
    notes = {0: note(0), 2: note(2, fields={"layout": "S1"})}
    state, action = advance(ANNOUNCED, View(101.0, notes=notes), TERMS)
    assert state.mismatch_since == 101.0
    assert action == Look(PATIENCE_SECONDS)
    state, action = advance(state, View(101.0 + MISMATCH_SECONDS, notes=notes), TERMS)
    assert isinstance(action, Abort)
    late = advance(State(Phase.ANNOUNCED, 109.9), View(110.0, notes=notes), TERMS)[1]
    assert isinstance(late, Abort), "not beyond the deadline"


def test_a_mismatch_that_goes_away_is_forgotten() -> None:
    state, _ = advance(State(Phase.ANNOUNCED, 101.0), View(101.2, notes={0: note(0), 1: note(1)}), TERMS)
    assert state.mismatch_since is None


def test_calls_of_other_numbers_are_a_mismatch() -> None:
    notes = {**ALIKE, 1: note(1, epoch=CallEpoch("ranks", 5))}
    _, action = advance(ANNOUNCED, View(101.0, notes=notes), TERMS)
    assert isinstance(action, Abort)
    assert action.text.startswith("rank 1 makes its call number 5 and rank 0 its call number 3 on these ranks")


def test_a_refusal_is_no_mismatch_and_comes_first() -> None:
    refused = note(2, digest=None, refusal="rank 2 refused the call: SpecError: no", epoch=CallEpoch("all", 1))
    notes = {0: note(0), 1: note(1, fields={"layout": "S1"}), 2: refused}
    _, action = advance(ANNOUNCED, View(101.0, notes=notes), TERMS)
    expected = ("rank 2 refused the call: SpecError: no", 2, (EPOCH, CallEpoch("all", 1)), (), False)
    assert action == Abort(*expected)


def test_a_rank_that_died_is_not_waited_for_until_the_deadline() -> None:
    terms = replace(TERMS, dead={2: "rank 2 died: its connection closed"})
    some = {0: note(0), 1: note(1)}
    assert advance(ANNOUNCED, View(100.0 + DEAD_SECONDS - 0.5, notes=some), terms)[1] == Look(PATIENCE_SECONDS)
    _, action = advance(ANNOUNCED, View(100.0 + DEAD_SECONDS, notes=some), terms)
    assert isinstance(action, Abort)
    assert action.absent == (2,)
    assert action.text.startswith("rank 2 died: its connection closed; it did not come back")
    # Others that are missing may come yet.
    assert advance(ANNOUNCED, View(100.0 + DEAD_SECONDS, notes={0: note(0)}), terms)[1] == Look(PATIENCE_SECONDS)


def test_a_rank_that_waits_for_those_who_are_here_is_not_waited_for() -> None:
    view = View(101.0, notes={0: note(0), 1: note(1)}, missed=(2, "rank 2 waits for rank 0 in call 3 of b"))
    assert advance(ANNOUNCED, view, TERMS)[1] == Abort("rank 2 waits for rank 0 in call 3 of b", 2, (EPOCH,))
