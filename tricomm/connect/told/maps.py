"""Bound maps as bytes, and either kind of map behind a code.

    map       RULES, rules (see ``rules``) | BOUND, bound
    bound     sources (name; shape; dtype) ... | rules (name) ... | forms (pieces ...) ... |
              tensors (name; shape; dtype; sources; form; rule) ...
    piece     start | source start | source tensor, or none and a value | digits (5 integers) ...

Layers and experts are alike: what they have in common, their form, is told once. Whoever reads a map proves anew that
each piece stays inside of both its tensors, and that the pieces are as many elements as their tensor has.
"""

from collections.abc import Sequence
from math import prod
from typing import TypeVar

from tricomm.connect.meeting.wire import Reader, WireError, Writer
from tricomm.connect.told.rules import MAX_ITEMS, MAX_MADE_BYTES, decode_rules, encode_rules
from tricomm.connect.told.words import (
    MAX_DIMS,
    NONE,
    read_filling,
    write_name,
    write_number,
    write_numbers,
    write_value,
)
from tricomm.errors import SpecError, TricommError
from tricomm.layout.dtype import dtype_name
from tricomm.rules.bound import BoundRules, BoundSource, BoundTensor
from tricomm.rules.boxes import REPEATED, Digit, Piece
from tricomm.rules.checks import Shape
from tricomm.rules.rules import Rules

T = TypeVar("T")
Map = Rules | BoundRules

MAX_MAP_BYTES = 64 << 20
MAX_PROVEN = 1 << 22
"""Pieces that are looked at, those of each form once for each kind of tensors that has it."""

RULES, BOUND = 1, 2
DIGIT_FIELDS = len(Digit._fields)
MAX_DIGITS = 256
"""Of a piece."""

SMALLEST_TENSOR, SMALLEST_PIECE = 40, 32
"""Bytes that one takes at least."""


def encode_map(told: Map) -> bytes:
    """Return rules or a bound map as bytes, the same for the same.

    Raises:
        SpecError: more than can be told.
    """
    if isinstance(told, Rules):
        found = Writer(RULES).done() + encode_rules(told)
    else:
        found = Writer(BOUND).done() + _encode_bound(told)
    if len(found) > MAX_MAP_BYTES:
        raise SpecError(f"a map of {len(found)} bytes cannot be told, the most are {MAX_MAP_BYTES}; tell it in parts")
    return found


def decode_map(data: bytes, most_nbytes: int = MAX_MADE_BYTES) -> Map:
    """Read rules or a bound map.

    Args:
        data: all of it.
        most_nbytes: that what rules stand for may take.

    Raises:
        WireError: the bytes are none, or say what no map can.
    """
    reader = Reader(data)
    kind = reader.code()
    found: Map
    if kind == RULES:
        found = decode_rules(reader, most_nbytes)
    elif kind == BOUND:
        found = _decode_bound(reader)
    else:
        raise WireError(f"{kind} is no kind of a map; the peer is broken")
    reader.end()
    return found


def _encode_bound(bound: BoundRules) -> bytes:
    forms: dict[tuple[Piece, ...], int] = {}
    rules: dict[str, int] = {}
    place = {source.name: number for number, source in enumerate(bound.sources)}
    tensors = Writer().integer(len(bound.tensors))
    for tensor in bound.tensors:
        _write_head(tensors, tensor)
        tensors.integers(place[name] for name in tensor.sources)
        tensors.integer(forms.setdefault(tensor.pieces, len(forms)))
        tensors.integer(rules.setdefault(tensor.rule, len(rules)))
    writer = Writer().integer(len(bound.sources))
    for source in bound.sources:
        _write_head(writer, source)
    writer.integer(len(rules))
    for rule in rules:
        write_name(writer, rule)
    writer.integer(len(forms))
    for pieces in forms:
        writer.integer(len(pieces))
        for piece in pieces:
            _write_piece(writer, piece)
    return writer.done() + tensors.done()


def _write_head(writer: Writer, one: BoundSource | BoundTensor) -> None:
    write_name(writer, one.name)
    write_numbers(writer, one.shape)
    writer.text(one.dtype or "")


def _read_head(reader: Reader) -> tuple[str, Shape, str | None]:
    name, shape, dtype = reader.text(), reader.integers(MAX_DIMS), reader.text() or None
    if min(shape, default=0) < 0:
        raise WireError(f"tensor {name!r} has shape {shape}; the peer is broken")
    try:
        return name, shape, None if dtype is None else dtype_name(dtype)
    except TricommError as error:
        raise WireError(f"tensor {name!r}: {error}") from error


def _write_piece(writer: Writer, piece: Piece) -> None:
    write_numbers(writer, piece.start)
    write_numbers(writer, piece.source_start)
    writer.integer(NONE if piece.tensor is None else piece.tensor)
    if piece.tensor is None:
        assert piece.value is not None
        write_value(writer, piece.value)
    writer.integer(len(piece.digits))
    for digit in piece.digits:
        for value in digit:
            write_number(writer, value)


def _read_piece(reader: Reader) -> Piece:
    start, source_start, tensor = reader.integers(MAX_DIMS), reader.integers(MAX_DIMS), reader.integer(NONE)
    value = read_filling(reader) if tensor == NONE else None
    count = reader.count(8 * DIGIT_FIELDS, MAX_DIGITS)
    digits = tuple(Digit(*(reader.integer() for _ in range(DIGIT_FIELDS))) for _ in range(count))
    return Piece(digits, start, source_start, None if tensor == NONE else tensor, value)


def _decode_bound(reader: Reader) -> BoundRules:
    sources = tuple(BoundSource(*_read_head(reader)) for _ in range(reader.count(16, MAX_ITEMS)))
    rules = tuple(reader.text() for _ in range(reader.count(4, MAX_ITEMS)))
    forms = tuple(
        tuple(_read_piece(reader) for _ in range(reader.count(SMALLEST_PIECE, MAX_ITEMS)))
        for _ in range(reader.count(8, MAX_ITEMS))
    )
    proof = _Proof(forms)
    tensors = []
    for _ in range(reader.count(SMALLEST_TENSOR, MAX_ITEMS)):
        name, shape, dtype = _read_head(reader)
        read = tuple(_one_of(sources, number) for number in reader.integers(MAX_ITEMS))
        number, rule = reader.integer(0), _one_of(rules, reader.integer(0))
        pieces = _one_of(forms, number)
        proof.require(number, shape, tuple(source.shape for source in read))
        tensors.append(BoundTensor(name, shape, dtype, tuple(source.name for source in read), pieces, rule))
    for what in (sources, tensors):
        names = [one.name for one in what]
        if len(set(names)) != len(names):
            raise WireError("a tensor of a map is told twice; the peer is broken")
    return BoundRules(tuple(tensors), sources)


def _one_of(given: Sequence[T], number: int) -> T:
    if not 0 <= number < len(given):
        raise WireError(f"number {number} of {len(given)} is told; the peer is broken")
    return given[number]


class _Proof:
    """That pieces lie inside of their tensors, looked at once for each kind of tensors."""

    def __init__(self, forms: Sequence[tuple[Piece, ...]]) -> None:
        self._forms = forms
        self._known: set[tuple[int, Shape, tuple[Shape, ...]]] = set()
        self._looked_at = 0

    def require(self, number: int, shape: Shape, sources: tuple[Shape, ...]) -> None:
        """Prove a form for a tensor of that shape, made of sources of those.

        Raises:
            WireError: it does not fit.
        """
        key = (number, shape, sources)
        if key in self._known:
            return
        pieces = self._forms[number]
        self._looked_at += len(pieces)
        if self._looked_at > MAX_PROVEN:
            raise WireError(f"a map has more than {MAX_PROVEN} pieces of different kinds; tell it in parts")
        for piece in pieces:
            _require_inside(piece, shape, sources)
        if sum(piece.numel for piece in pieces) != prod(shape):
            raise WireError(f"the pieces of a tensor of shape {shape} are not as many elements; the peer is broken")
        self._known.add(key)


def _require_inside(piece: Piece, shape: Shape, sources: tuple[Shape, ...]) -> None:
    there = [(digit.dim, digit.size, digit.step) for digit in piece.digits]
    walking = [(d.source_dim, d.size, d.source_step) for d in piece.digits if d.source_dim != REPEATED]
    still = [digit.source_step for digit in piece.digits if digit.source_dim == REPEATED]
    source = () if piece.tensor is None else _one_of(sources, piece.tensor)
    if not _is_inside(piece.start, there, shape) or not _is_inside(piece.source_start, walking, source) or any(still):
        raise WireError("a piece of a map lies outside of its tensor; the peer is broken")
    if [*piece.digits] != sorted(piece.digits, key=lambda digit: (digit.dim, -digit.step)):
        raise WireError("the digits of a piece are told in another order than theirs; the peer is broken")


def _is_inside(start: Shape, digits: Sequence[tuple[int, int, int]], shape: Shape) -> bool:
    """Whether a walk along (dim, size, step) from a start on stays inside of a tensor."""
    if len(start) != len(shape) or min(start, default=0) < 0:
        return False
    last = list(start)
    for dim, size, step in digits:
        if not 0 <= dim < len(shape) or size < 2 or step < 1:
            return False
        last[dim] += (size - 1) * step
    return all(at < size for at, size in zip(last, shape, strict=True))
