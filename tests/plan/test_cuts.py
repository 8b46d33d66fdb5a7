"""Cuts of regions: nothing is lost, the order stays, and a cut is no further from its point than allowed."""

import itertools
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.layout.test_spec import expand, interval_lists, quick
from tricomm.layout import intervals
from tricomm.layout.intervals import Region, cut_shapes, region_numel, region_shape
from tricomm.plan.parts import Part, cut_parts, nbytes_of


@quick
@given(
    regions=st.lists(st.tuples(*[interval_lists()] * 3), min_size=1, max_size=3),
    where=st.lists(st.floats(0, 1), max_size=6),
    slack=st.integers(0, 20),
    itemsizes=st.lists(st.sampled_from([1, 2, 4]), min_size=3, max_size=3),
)
def test_cuts_keep_every_element_in_order(
    regions: list[Region], where: list[float], slack: int, itemsizes: list[int]
) -> None:
    def elements(pieces: list[Region]) -> list[tuple[int, ...]]:
        return [at for piece in pieces for at in itertools.product(*(expand(intervals) for intervals in piece))]

    assert sum(map(region_numel, regions)) == len(elements(regions))
    assert [region_shape(region) for region in regions] == [tuple(len(expand(i)) for i in r) for r in regions]
    regions = [region for region in regions if region_numel(region)]
    parts = [Part(0, itemsize, region) for itemsize, region in zip(itemsizes, regions, strict=False)]
    nbytes = nbytes_of(parts)
    points = sorted(int(fraction * nbytes) for fraction in where)
    groups = cut_parts(parts, 1, points, slack)
    assert elements([part.region for group in groups for part in group]) == elements(regions)
    assert [part.itemsize for group in groups for part in group for _ in range(part.numel)] == [
        part.itemsize for part in parts for _ in range(part.numel)
    ]
    assert len(groups) == len(points) + 1
    before = 0
    for group, point in zip(groups, points, strict=False):
        before += nbytes_of(group)
        assert abs(before - point) < slack + max(itemsizes)  # an element is never cut


@quick
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 64, 100, 1000]), max_size=4).map(tuple),
    weight=st.sampled_from([1, 2, 4]),
    where=st.lists(st.floats(0, 1), max_size=9),
    slack=st.integers(0, 400),
)
def test_cuts_between_rows_are_those_of_pieces(
    shape: tuple[int, ...], weight: int, where: list[float], slack: int
) -> None:
    points = sorted(int(fraction * prod(shape) * weight) for fraction in where)
    found = cut_shapes([shape], [weight], points, slack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_cuts_of_one", lambda *_: None)
        assert found == cut_shapes([shape], [weight], points, slack)
