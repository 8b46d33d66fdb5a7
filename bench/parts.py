"""What a part of gpu_check tells about each of its checks."""

from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """One line of the last table.

    Attributes:
        name: "part: check".
        passed: whether all was as it should be.
        text: what was checked, or what was wrong.
        figures: values that JSON has, if anything was measured.
    """

    name: str
    passed: bool
    text: str
    figures: Any = None
