"""How fast the kernels are, as a share of a plain copy of the same bytes in the same run."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.kernels.cases import CASES, Case
from bench.kernels.run import OURS, Row, format_rows, measure

REPEATS = 5
MOSTLY = 0.98
"""Sectors that allow as much of a copy's speed are not mentioned."""
REHEARSED_SCALE = 4096
SOME = (
    "flat 256 MB",
    "run of 512 B",
    "run of 128 B",
    "80 layers of K and V",
    "vocabulary 50257, columns",
    "45,000 boxes",
    "float32 to bfloat16",
    "transposed bfloat16",
)
"""Of all geometries: the ceiling, what has a target, what is awkward."""


def some(setting: Setting) -> Iterator[Outcome]:
    """The part "throughput"."""
    yield from measured([case for case in CASES if case.name in SOME], setting)


def every(setting: Setting) -> Iterator[Outcome]:
    """The part "geometries"."""
    yield from measured(CASES, setting)


def measured(cases: Sequence[Case], setting: Setting) -> Iterator[Outcome]:
    """Time each by itself, and print the table of all at the end."""
    rows: list[Row] = []
    for case in cases:
        yield guarded(case.name, partial(_told, case, setting, rows))
    print(format_rows(rows), flush=True)


def _told(case: Case, setting: Setting, rows: list[Row]) -> tuple[str, dict[str, Any]]:
    row = measure(case, torch.device(setting.device), setting.scaled(1, REHEARSED_SCALE), setting.scaled(REPEATS, 1))
    rows.append(row)
    copy_seconds = row.timings["copy"].device_seconds
    text = f"pack {row.share('pack'):.0%}, unpack {row.share('unpack'):.0%} of the copy"
    text += f" ({row.moved_nbytes / copy_seconds / 1e12:.2f} TB/s read and written)"
    if min(row.allowed.values()) < MOSTLY:
        text += f", {row.share_of_allowed('pack'):.0%} and {row.share_of_allowed('unpack'):.0%} of what sectors allow"
    shares = [(row.share(name), name) for name in row.timings if name not in OURS]
    if shares:
        best, name = max(shares)
        text += f"; {row.share('pack') / best:.1f} x torch's best, {name}"
    text += f"; torch refuses {', '.join(row.refused)}" if row.refused else ""
    return text, asdict(row)
