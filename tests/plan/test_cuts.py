"""Cuts of regions: nothing is lost, the order stays, and a cut is no further from its point than allowed."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.layout.test_spec import expand, interval_lists, quick
from tricomm.layout.intervals import Region, cut_regions, region_numel, region_shape


@quick
@given(
    regions=st.lists(st.tuples(*[interval_lists()] * 3), min_size=1, max_size=3),
    where=st.lists(st.floats(0, 1), max_size=6),
    slack=st.integers(0, 20),
)
def test_cut_regions_keeps_every_element_in_order(regions: list[Region], where: list[float], slack: int) -> None:
    def elements(pieces: list[Region]) -> list[tuple[int, ...]]:
        return [at for piece in pieces for at in itertools.product(*(expand(intervals) for intervals in piece))]

    numel = len(elements(regions))
    assert sum(map(region_numel, regions)) == numel
    assert [region_shape(region) for region in regions] == [tuple(len(expand(i)) for i in r) for r in regions]
    regions = [region for region in regions if region_numel(region)]
    points = sorted(int(fraction * numel) for fraction in where)
    parts = cut_regions(regions, points, slack)
    assert elements([region for part in parts for region in part]) == elements(regions)
    assert len(parts) == len(points) + 1
    before = 0
    for part, point in zip(parts, points, strict=False):
        before += len(elements(list(part)))
        assert abs(before - point) <= slack
