"""The parts in their order, and what each tells. Imported before torch is known to work."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

NO_DEVICE = 77
"""Exit status of a part's process where there is no CUDA device; no other error has it."""


class Outcome(NamedTuple):
    """One line of the last table.

    Attributes:
        name: of the check.
        passed: whether all was as it should be; None if it could not be run here, which the text explains.
        text: what was checked, or all that is known of what was wrong.
        figures: values that JSON has, if anything was measured.
    """

    name: str
    passed: bool | None
    text: str
    figures: Any = None


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a part runs.

    Attributes:
        device: such as "cuda:0"; "cpu" in a rehearsal, where sizes are small and no kernel and no NCCL takes part.
        seconds: how long it has.
    """

    device: str
    seconds: float

    @property
    def is_rehearsal(self) -> bool:
        """Whether nothing that only a GPU can show is shown."""
        return self.device == "cpu"

    def scaled(self, on_a_gpu: int, in_a_rehearsal: int) -> int:
        """A size."""
        return in_a_rehearsal if self.is_rehearsal else on_a_gpu


@dataclass(frozen=True, slots=True)
class Part:
    """A process of its own.

    Attributes:
        name: on the command line.
        function: "module:function" in this package; it takes a Setting and yields outcomes.
        limit_seconds: after which it is killed; what earlier parts did not use may be lent to it.
        is_long: whether it belongs to the second pass.
    """

    name: str
    function: str
    limit_seconds: float
    is_long: bool = False


HOST = Part("versions", "host:versions", 30)
"""Always the first: what it finds is what all figures belong to."""

PARTS = (
    HOST,
    Part("pair", "transport:one_move", 25),
    Part("boxes", "kernels:boxes", 20),
    Part("casts", "kernels:casts", 25),
    Part("graphs", "kernels:graphs", 10),
    Part("local", "local:moves", 15),
    Part("nccl", "transport:moves", 25),
    Part("rules", "conformance:rules", 40),
    Part("pipeline", "uses.pipeline:two_stages", 25),
    Part("throughput", "throughput:some", 25),
    Part("geometries", "throughput:every", 120, is_long=True),
    Part("memory", "uses.memory:moves", 60, is_long=True),
    Part("overlap", "uses.overlap:visible", 60, is_long=True),
    Part("jobs", "uses.jobs:two_jobs", 60, is_long=True),
    Part("multicast", "uses.multicast:multicasts", 60, is_long=True),
    Part("sanitizer", "sanitizer:memcheck", 150, is_long=True),
)


def guarded(name: str, check: Callable[[], "str | tuple[str, Any]"]) -> Outcome:
    """Run one check, so that what it raises, whatever that is, hides no other.

    Args:
        name: of the check.
        check: returns what was checked, with figures if there are some.
    """
    try:
        found = check()
    except KeyboardInterrupt:
        raise
    except BaseException:  # a compiler's errors and torch's have no base in common
        return Outcome(name, False, traceback.format_exc())
    text, figures = (found, None) if isinstance(found, str) else found
    return Outcome(name, True, text, figures)
