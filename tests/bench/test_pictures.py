"""The pictures of the READMEs are what the library draws now."""

import pytest

from bench.pictures import FOLDER, PICTURES
from tests.test_readme import EXAMPLES, README


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_as_it_is_committed(name: str) -> None:
    assert (FOLDER / name).read_text() == PICTURES[name](), "run python -m bench.pictures and look at the picture"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_shown(name: str) -> None:
    assert f"bench/results/{name})" in README + EXAMPLES
