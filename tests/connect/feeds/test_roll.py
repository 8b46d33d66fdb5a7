"""Who has answered, out of any number of ranks in any order."""

from hypothesis import given
from hypothesis import strategies as st

from tricomm.connect.feeds.roll import WORD_BITS, RollCall
from tricomm.connect.meeting.table import Table
from tricomm.layout.mesh import format_ranks


class Store(Table):
    """A meeting's table by the names of torch's Store."""

    find = Table.get
    delete_key = Table.delete


@given(st.data())
def test_the_last_to_answer_knows_it_and_who_has_not_is_named(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 2, 5, WORD_BITS, WORD_BITS + 1, 3 * WORD_BITS]) | st.integers(1, 200))
    ranks = data.draw(st.permutations(range(7, 7 + 2 * count, 2)))
    order = data.draw(st.permutations(ranks))
    asked = data.draw(st.integers(0, count - 1))
    store = Store()
    other = RollCall(store, "another question", ranks)
    other.answer(order[0])
    calls = [RollCall(store, "here", ranks) for _ in range(count)]
    for number, rank in enumerate(order):
        if number == asked:
            missing = [one for one in ranks if one in order[number:]]
            who = f"{'rank' if len(missing) == 1 else 'ranks'} {format_ranks(missing)}"
            assert calls[0].describe_missing("are here") == f"{number} of {count} ranks are here, but not {who}"
        assert not calls[0].is_complete()
        assert calls[number].answer(rank) == (number == count - 1)
    assert calls[0].is_complete()
    assert calls[0].describe_missing("are here") == ""
    calls[0].clear()
    other.clear()
    assert len(store) == 0
