"""Fields that layouts, rules and maps have in common: what cannot be told whole is refused, and never cut."""

from tricomm.connect.meeting.wire import MAX_TEXT_BYTES, Reader, WireError, Writer
from tricomm.errors import SpecError, check_text

NONE = -1
"""In place of a number that is at least 0, or alone in place of several: there is none."""

MAX_DIMS = 64
"""Of a tensor."""

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1

INTEGER, REAL, TRUTH, TEXT = range(4)
"""Kinds of a value."""

Value = int | float | str


def write_name(writer: Writer, name: str) -> None:
    """Append a name.

    Raises:
        SpecError: it is no text, or longer than a name can be that is told.
    """
    check_text("name", name)
    data = name.encode()
    if len(data) > MAX_TEXT_BYTES:
        raise SpecError(
            f"a name has {len(data)} bytes, and the most are {MAX_TEXT_BYTES}: {name[:60]!r}...; shorten it"
        )
    writer.octets(data)


def write_number(writer: Writer, value: int) -> None:
    """Append an integer.

    Raises:
        SpecError: it has more than 64 bits.
    """
    if not LOWEST <= value <= HIGHEST:
        raise SpecError(f"{value:#x} has more than 64 bits; tensors have no such size or place")
    writer.integer(value)


def write_numbers(writer: Writer, values: tuple[int, ...]) -> None:
    """Append integers behind their count."""
    writer.integer(len(values))
    for value in values:
        write_number(writer, value)


def write_optional(writer: Writer, values: tuple[int, ...] | None) -> None:
    """Append integers that are at least 0, or that there are none."""
    write_numbers(writer, (NONE,) if values is None else values)


def read_optional(reader: Reader, limit: int = MAX_DIMS) -> tuple[int, ...] | None:
    """Take what ``write_optional`` appends."""
    values = reader.integers(limit)
    return None if values == (NONE,) else values


def write_value(writer: Writer, value: Value) -> None:
    """Append a number, a truth value or a text, which stay what they are: a name says True and not 1."""
    match value:
        case bool():
            writer.code(TRUTH).code(value)
        case int():
            write_number(writer.code(INTEGER), value)
        case float():
            writer.code(REAL).real(value)
        case _:
            write_name(writer.code(TEXT), value)


def read_value(reader: Reader) -> Value:
    """Take what ``write_value`` appends."""
    kind = reader.code()
    if kind == TRUTH:
        return bool(reader.code())
    if kind == INTEGER:
        return reader.integer()
    if kind == REAL:
        return reader.real()
    if kind == TEXT:
        return reader.text()
    raise WireError(f"{kind} is no kind of a value; the peer is broken")


def read_filling(reader: Reader) -> float:
    """Take a value that fills a tensor."""
    value = read_value(reader)
    if isinstance(value, str):
        raise WireError(f"{value!r} fills nothing, as it is no number; the peer is broken")
    return value
