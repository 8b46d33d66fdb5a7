"""Which program a step has: the first of its kind hides nothing where kernels are loaded."""

from tricomm.pipeline import gpipe
from tricomm.pipeline.run.step import MAX_SIZES, Programs


def test_sizes_used_long_ago_are_forgotten() -> None:
    """Without a bound, a job whose sizes always differ would keep them all."""
    programs = Programs(gpipe(2, 2), {}, {}, loads_kernels=True)
    rows = [((("rows", size),),) for size in range(2 * MAX_SIZES)]
    first = programs.next(True, rows[0])
    assert first.is_synchronous
    assert programs.next(False, rows[0]).is_synchronous, "an evaluation has its own first step"
    for size in rows[1 : MAX_SIZES - 3]:
        assert programs.next(True, size) is first
        assert not programs.next(True, rows[0]).is_synchronous, "used again and again"
    for size in rows[MAX_SIZES:]:
        assert programs.next(True, size) is first
    assert programs.next(True, rows[0]) is first


def test_sizes_are_known_one_by_one() -> None:
    """Of some lengths of microbatches there are many combinations, and no kernel knows more than one."""
    programs = Programs(gpipe(2, 2), {}, {}, loads_kernels=True)
    short, long, longest = ((("rows", size),) for size in (1, 2, 3))
    assert programs.next(True, (short, long)).is_synchronous
    for known in ((long, short), (short, short), (long, long)):
        assert not programs.next(True, known).is_synchronous
    assert programs.next(True, (short, longest)).is_synchronous
    assert not programs.next(True, (longest, long)).is_synchronous
    assert programs.next(False, (short, long)).is_synchronous


def test_where_no_kernels_are_loaded_no_step_differs() -> None:
    programs = Programs(gpipe(2, 2), {}, {}, loads_kernels=False)
    assert not programs.next(True, ()).is_synchronous
    assert programs.next(True, ()) is programs.next(True, ((("rows", 3),),))
