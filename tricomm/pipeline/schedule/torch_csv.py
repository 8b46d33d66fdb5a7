"""Schedules as the CSV files of torch.distributed.pipelining: a row per rank of the pipeline, a cell per action.

torch reads them with ``_load_csv(path, format="compute_only")`` and puts in its own sends and receives, or with
``format="compute_comms"`` as they are. torchtitan's ``pipeline_parallel_schedule_csv`` is the former.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.pipeline.schedule.actions import Action, Edge
from tricomm.pipeline.schedule.schedule import Schedule, chain

_NOT_OF_THE_PIPELINE = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_OVERLAPPED = re.compile(r"\(([^)]*)\)OVERLAP_F_B")


@checks_kinds
def write_csv(schedule: Schedule) -> str:
    """The text of a file that torch reads: "compute_comms" if the schedule has sends and receives, else "compute_only".

    Raises:
        PlanError: an edge between stages that are no neighbours, which torch does not know.

    Example:
        >>> from tricomm.pipeline.schedule.generators import gpipe
        >>> write_csv(gpipe(2, 2)).splitlines()
        ['0F0,0F1,0B0,0B1', '1F0,1F1,1B0,1B1']
    """
    if schedule.edges != chain(schedule.stages):
        edges = ", ".join(map(str, schedule.edges))
        raise PlanError(
            f"the edges {edges} are not the chain of {schedule.stages} stages, and torch's schedules know no others; "
            "keep this schedule as text, or run it with tricomm's executor"
        )
    out = io.StringIO()
    csv.writer(out).writerows([str(action) for action in actions] for actions in schedule.lists)
    return out.getvalue()


@checks_kinds
def read_csv(text: str, edges: Iterable[tuple[int, int]] = ()) -> Schedule:
    """A schedule that torch, or ``write_csv``, has written.

    Empty cells are left out, and so are UNSHARD, RESHARD and REDUCE_GRAD, with which torch drives FSDP inside of a
    stage. The parts of an OVERLAP_F_B come one after the other, as torch runs them.

    Args:
        text: of the file.
        edges: which stages feed which; () is the chain.

    Raises:
        PlanError: a cell that is no action, or actions that are no schedule.

    Example:
        >>> read_csv("0F0,0F1,,0B0,0B1").lists
        ((Action.parse('0F0'), Action.parse('0F1'), Action.parse('0B0'), Action.parse('0B1')),)
    """
    lists = tuple(tuple(_actions(row)) for row in csv.reader(io.StringIO(text)))
    return Schedule(lists, tuple(Edge(*edge) for edge in edges))


def _actions(row: Iterable[str]) -> Iterator[Action]:
    for cell in (cell.strip() for cell in row):
        overlapped = _OVERLAPPED.fullmatch(cell)
        if overlapped:
            yield from _actions(overlapped[1].split(";"))
        elif cell and not _NOT_OF_THE_PIPELINE.fullmatch(cell):
            yield Action.parse(cell)
