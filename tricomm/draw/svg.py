"""What the pictures share: a sheet with a title, boxes, words, a legend and an axis of time."""

from collections.abc import Iterable, Iterator
from html import escape
from math import floor, log10

from tricomm.errors import PlanError

INK, FAINT, PANEL, GRID = "#333333", "#777777", "#f4f4f4", "#e4e4e4"
LETTER = 6.4
"""Width of a letter of the legend, about."""


def check_width(width: int, margins: int) -> None:
    """Refuse a picture that is nothing but its margins."""
    if width <= margins:
        raise PlanError(f"width={width} must be above {margins}, which the margins take; give pixels, such as 1400")


def sheet(width: int, height: int, title: str, left: float, elements: Iterable[str]) -> Iterator[str]:
    """An SVG of some elements below a title."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="{INK}">'
    )
    yield f'<rect width="{width}" height="{height}" fill="white"/>'
    yield f'<text x="{left}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>'
    yield from elements
    yield "</svg>"


def box(left: float, y: float, right: float, height: float, colour: str, tip: str, opacity: float = 1.0) -> str:
    """A filled box; one with a ``tip``, which a browser shows under the mouse, has a white edge."""
    shape = f'x="{left:.2f}" y="{y}" width="{max(0.0, right - left):.2f}" height="{height}" fill="{colour}"'
    edge = ' stroke="white" stroke-width="0.7"' + (f' fill-opacity="{opacity:.2f}"' if opacity < 1 else "")
    return f"<rect {shape}{edge}><title>{escape(tip)}</title></rect>" if tip else f"<rect {shape}/>"


def legend(left: float, y: float, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """(colour, name) side by side."""
    x = left
    for colour, name in entries:
        yield f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 17}" y="{y + 10}">{escape(name)}</text>'
        x += 36 + round(LETTER * len(name))


def axis(left: float, right: float, until: float, top: float, bottom: float, unit: str) -> Iterator[str]:
    """Ticks from 0 to ``until``, given in ``unit``, at round numbers."""
    step = round_step(until / 12)
    for tick in range(floor(until / step) + 1):
        x = left + tick * step * (right - left) / until
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{GRID}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick * step:.6g}</text>'
    yield f'<text x="{left - 10}" y="{bottom + 16}" text-anchor="end">{unit}</text>'


def round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below.

    Example:
        >>> round_step(0.3)
        0.5
    """
    power = 10.0 ** floor(log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
