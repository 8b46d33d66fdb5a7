"""Processes are started once and fed many cases; a test that starts others carries the marker ``processes``."""

import ast
import functools
import gc
import multiprocessing.process
import os
import subprocess
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tricomm.launch import Ranks

STARTS = ((subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start"), (os, "fork"))
STARTS_THE_FIXED_RANKS: ContextVar[bool] = ContextVar("STARTS_THE_FIXED_RANKS", default=False)


PRELOADED = ("torch", "torch._dynamo", "torch.distributed.tensor", "tricomm", "pytest", "hypothesis", "tests.cases")
"""What most ranks import sooner or later, for seconds on each; one process does it for all of them."""
COMPILER = (
    "torch._dynamo.backends.cudagraphs",
    "torch._inductor.lowering",
    "torch.export._trace",
    "tricomm.compiled.graph",
)
"""The same of what is imported when something is compiled for the first time."""

LONGEST_FIRST = (
    "standin/test_promise.py",
    "transport/test_properties.py",
    "bench/test_gpu_check_processes.py",
    "plan/test_product.py",
    "transport/device/test_promise.py",
    "transport/device/test_staying.py",
    "standin/test_multicast.py",
    "packing/test_rules.py",
    "packing/test_many.py",
    "connect/test_world.py",
    "kinds/test_kinds.py",
    "transport/coordination/test_rendezvous.py",
    "kernels/test_pack.py",
    "standin/test_rules.py",
    "interop/test_against_dtensor.py",
    "transport/memory/test_nearby.py",
    "standin/test_schedules.py",
    "standin/test_misordered.py",
    "transport/device/test_moves.py",
    "kernels/test_lines.py",
    "packing/test_selection.py",
)
"""Files that take longest without the fixed ranks, by turns those that wait for a timeout and those that compute: each
begins beside one of the other kind. They begin first: no worker shall be left with one at the end.
"""

ALLOCATIONS_TO_COLLECT = 5_000
"""Python's own 700 look through what caches hold more than twice as long in all."""


@functools.cache
def on_fixed_ranks(path: Path) -> frozenset[str]:
    """The tests of a file that take the fixture ``ranks``, read from its text: whoever hands out tests has not
    collected them.
    """
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return frozenset(one.name for one in functions if any(argument.arg == "ranks" for argument in one.args.args))


def pytest_configure(config: pytest.Config) -> None:
    """Compute on one thread, before torch is imported: two workers share two cores, and threads of one tensor that wait
    for each other spin meanwhile.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring forward what runs on the fixed ranks, then the longest files; all else stays in order."""

    def place(item: pytest.Item) -> int:
        takes = "ranks" in getattr(item, "fixturenames", ())
        if takes != (item.name.partition("[")[0] in on_fixed_ranks(item.path)):
            raise pytest.UsageError(f"{item.nodeid} takes ranks by another fixture; take them by the name of ranks")
        if takes:
            return -1
        file = item.nodeid.partition("::")[0].removeprefix("tests/")
        return LONGEST_FIRST.index(file) if file in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: collections need not look through torch, neither while it comes nor each time later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(ALLOCATIONS_TO_COLLECT)
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand whole files to workers, since fixtures stay with them, but all that runs on the fixed ranks to one worker.

    Two sets of ranks beside each other take each other's two cores at every message: a test of 9 seconds took 100.
    """
    from xdist.scheduler import LoadFileScheduling

    class OneSetOfRanks(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            test = nodeid.removeprefix(f"{file}::").partition("[")[0]
            return "the fixed ranks" if test in on_fixed_ranks(config.rootpath / file) else file

    return OneSetOfRanks(config, log)


class UnmarkedProcess(AssertionError):  # noqa: N818 - no error of the library
    """A test without the marker ``processes`` started a process of its own."""


def refusing(start: Callable[..., Any]) -> Callable[..., Any]:
    """``start`` for the fixture ``ranks``, an error for everything else."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        if STARTS_THE_FIXED_RANKS.get():
            return start(*arguments, **options)
        raise UnmarkedProcess(
            "this test starts a process and is not marked; add @pytest.mark.processes, which moves it to "
            "`make test-processes`, or do it in this process or on the fixture `ranks`"
        )

    return refuse


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold the two halves of the tests apart: fixtures of any scope, the test, and what is torn down after it."""
    if item.get_closest_marker("processes") is not None:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STARTS:
            patch.setattr(owner, name, refusing(getattr(owner, name)))
        return (yield)


@pytest.fixture(scope="session")
def fixed_ranks() -> Iterator["Ranks"]:
    """Processes that are started once."""
    # Not before: the process that only hands tests to workers needs no torch, and the workers wait for it.
    from tests.cases import RANKS
    from tricomm.launch import Ranks

    token = STARTS_THE_FIXED_RANKS.set(True)
    running = Ranks(RANKS, timeout_seconds=60, preload=PRELOADED + COMPILER)
    STARTS_THE_FIXED_RANKS.reset(token)
    with running:
        yield running


@pytest.fixture(scope="module")
def ranks(fixed_ranks: "Ranks") -> Iterator["Ranks"]:
    """The fixed processes, on which every test without the marker runs what needs more than one rank.

    After a file they have the group that they began with: torch's threads of each wake 100 times a second.
    """
    from tests.pipeline.models import end_groups

    yield fixed_ranks
    fixed_ranks.run(end_groups)
