"""From an expression to its pieces: every destination index is pushed down to the leaf that it comes from."""

from collections.abc import Mapping
from itertools import accumulate, pairwise

from tricomm.rules.boxes import REPEATED, Digit, Piece, cut, divide
from tricomm.rules.checks import Span
from tricomm.rules.coalesce import coalesced
from tricomm.rules.expressions import (
    Cast,
    Each,
    Expanded,
    Expression,
    Filled,
    Flattened,
    Indexed,
    Joined,
    Permuted,
    Source,
    Unflattened,
)


def lower(expression: Expression, sources: Mapping[str, int]) -> tuple[Piece, ...]:
    """The normal form: disjoint pieces, as few as can be found, in the order in which they stand in the destination.

    Args:
        expression: without index variables, and of known shape.
        sources: the place of each source tensor by its name.

    Example:
        >>> from tricomm.rules import fill, source
        >>> [[str(digit) for digit in piece.digits] for piece in lower(source("q", (4, 6)).permute(1, 0), {"q": 0})]
        [['6(d0+1 <- d1+1)', '4(d1+1 <- d0+1)']]
    """
    shape = expression.shape
    assert shape is not None
    if 0 in shape:
        return ()
    digits = tuple(Digit(size, dim, 1, dim, 1) for dim, size in enumerate(shape) if size > 1)
    start = (0,) * len(shape)
    return coalesced(_pushed(Piece(digits, start, start), expression, sources))


def _pushed(piece: Piece, at: Expression | Each, sources: Mapping[str, int]) -> list[Piece]:
    """Pieces of leaves, from a piece of which the source is ``at``."""
    match at:
        case Source(name=name):
            return [Piece(piece.digits, piece.start, piece.source_start, sources[name])]
        case Filled(value=value):
            still = [digit._replace(source_dim=REPEATED, source_step=0) for digit in piece.digits]
            return [Piece(tuple(still), piece.start, (), None, value)]
        case Joined():
            return _joined(piece, at, sources)
        case Flattened():
            parts = _flattened(piece, at)
        case Cast():
            parts = [piece]
        case Indexed():
            parts = [_indexed(piece, at)]
        case Unflattened():
            parts = [_unflattened(piece, at)]
        case Permuted(dims=dims):
            to = tuple(dim % len(dims) for dim in dims)
            start = tuple(piece.source_start[to.index(dim)] for dim in range(len(to)))
            parts = [_moved(piece, dict(enumerate(to)), start)]
        case Expanded():
            parts = [_expanded(piece, at)]
        case _:
            raise AssertionError(f"{at!r} is no node of the algebra")
    (child,) = at._children()
    return [leaf for part in parts for leaf in _pushed(part, child, sources)]


def _moved(
    piece: Piece, to: Mapping[int, int], start: tuple[int, ...], steps: Mapping[int, int] | None = None
) -> Piece:
    """With source dims renamed by ``to`` (those that it leaves out repeat) and their steps multiplied."""
    digits = []
    for digit in piece.digits:
        if digit.source_dim != REPEATED:
            dim = to.get(digit.source_dim, REPEATED)
            step = digit.source_step * (steps or {}).get(digit.source_dim, 1)
            digit = digit._replace(source_dim=dim, source_step=0 if dim == REPEATED else step)
        digits.append(digit)
    return piece.replaced(digits, start)


def _indexed(piece: Piece, at: Indexed) -> Piece:
    start: list[int] = []
    to: dict[int, int] = {}
    steps: dict[int, int] = {}
    sizes = iter(at._of_shape)
    outer = 0
    for entry in at.entries():
        if entry is None:
            outer += 1
            continue
        size = next(sizes)
        if isinstance(entry, Span):
            taken = entry.of(size)
            start.append(taken.start + taken.step * piece.source_start[outer])
            to[outer], steps[outer] = len(start) - 1, taken.step
            outer += 1
        else:
            assert isinstance(entry, int)
            start.append(entry % size)
    return _moved(piece, to, tuple(start), steps)


def _unflattened(piece: Piece, at: Unflattened) -> Piece:
    assert at.shape is not None
    first = at._dim(at.dim)
    added = len(at.shape) - len(at._of_shape)
    sizes = at.shape[first : first + added + 1]
    strides = list(accumulate(reversed(sizes[1:]), int.__mul__, initial=1))[::-1]
    old = piece.source_start
    joined = sum(map(int.__mul__, old[first : first + added + 1], strides))
    to = {dim: dim if dim < first else max(first, dim - added) for dim in range(len(old))}
    steps = {first + index: stride for index, stride in enumerate(strides)}
    return _moved(piece, to, (*old[:first], joined, *old[first + added + 1 :]), steps)


def _flattened(piece: Piece, at: Flattened) -> list[Piece]:
    start, stop = at.dims
    parts = [piece]
    for size in reversed(at._of_shape[start + 1 : stop]):
        parts = [divided for part in parts for divided in divide(part, start, size)]
    return parts


def _expanded(piece: Piece, at: Expanded) -> Piece:
    assert at.shape is not None
    added = len(at.shape) - len(at._of_shape)
    repeated = {added + dim for dim, size in enumerate(at._of_shape) if size == 1}
    to = {dim: dim - added for dim in range(added, len(at.shape)) if dim not in repeated}
    start = tuple(0 if dim in repeated else piece.source_start[dim] for dim in range(added, len(at.shape)))
    return _moved(piece, to, start)


def _joined(piece: Piece, at: Joined, sources: Mapping[str, int]) -> list[Piece]:
    dim = at.joined_dim
    sizes = [1 if at.stacks else part.shape[dim] for part in at.parts if part.shape is not None]
    result: list[Piece] = []
    rest = [piece]
    for part, (begin, end) in zip(at.parts, pairwise(accumulate(sizes, initial=0)), strict=True):
        here: list[Piece] = []
        beyond: list[Piece] = []
        for one in rest:
            near, far = cut(one, dim, end - one.source_start[dim])
            here, beyond = here + near, beyond + far
        rest = beyond
        for one in here:
            start = one.source_start
            if at.stacks:
                to = {old: old - (old > dim) for old in range(len(start)) if old != dim}
                one = _moved(one, to, (*start[:dim], *start[dim + 1 :]))
            else:
                one = one.replaced(one.digits, (*start[:dim], start[dim] - begin, *start[dim + 1 :]))
            result += _pushed(one, part, sources)
    return result
