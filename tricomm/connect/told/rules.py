"""Rules as bytes: expressions node by node, each behind a code, and the values of their index variables.

    rules        groups ...
    group        indices (name; values) ... | definitions (name; expression) ... | drop (pattern or expression) ...
    values       range | values ... | table (key, value) ...
    expression   code; its own fields; the expressions that it is made of

A line of rules may stand for any number of tensors. What it stands for is counted before any of it is made, so that a
peer that says ``range(10**12)`` is refused and takes no memory.
"""

from collections.abc import Iterator, Sequence
from math import prod

from tricomm.connect.meeting.wire import Reader, WireError, Writer
from tricomm.connect.told.words import (
    HIGHEST,
    MAX_DIMS,
    read_filling,
    read_optional,
    read_value,
    write_name,
    write_number,
    write_numbers,
    write_optional,
    write_value,
)
from tricomm.errors import SpecError, TricommError
from tricomm.rules.checks import Entry, Span
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
from tricomm.rules.names import Scope, Table, Values, references
from tricomm.rules.resolve import variables
from tricomm.rules.rules import Group, Rules

MAX_DEPTH = 64
"""Expressions within each other. Written by hand there are under ten."""

MAX_MADE_BYTES = 256 << 20
"""What rules stand for may take, as it is counted here: names, and NODE_BYTES for each node of each tensor."""

NODE_BYTES = 400
MAX_ITEMS = 1 << 20
"""Of one list: parts, definitions, values."""

RANGE, LISTED, TABLE = range(3)
PATTERN, REGION = range(2)
SOURCE, FILLED, CAT, STACK, INDEXED, UNFLATTENED, FLATTENED, PERMUTED, EXPANDED, CAST, EACH = range(11)
NEW, ELLIPSIS, SPAN, POSITION, VARIABLE = range(5)


def encode_rules(rules: Rules) -> bytes:
    """Return rules as bytes, the same for the same rules.

    Raises:
        SpecError: more than can be told, or deeper.
    """
    writer = Writer().integer(len(rules.groups))
    for group in rules.groups:
        writer.integer(len(group.scope.indices))
        for name, values in group.scope.indices:
            write_name(writer, name)
            _write_values(writer, values)
        writer.integer(len(group.definitions))
        for target, expression in group.definitions:
            write_name(writer, target)
            _write(writer, expression, MAX_DEPTH)
        writer.integer(len(group.drop))
        for what in group.drop:
            if isinstance(what, str):
                write_name(writer.code(PATTERN), what)
            else:
                _write(writer.code(REGION), what, MAX_DEPTH)
    made = sum(map(_made_nbytes, rules.groups))
    if made > MAX_MADE_BYTES:
        raise SpecError(
            f"the rules stand for {len(rules.names)} tensors and {made} bytes of names and expressions, and the most "
            f"that is told are {MAX_MADE_BYTES} bytes; give them on both sides, or exchange them in parts"
        )
    return writer.done()


def decode_rules(reader: Reader, most_nbytes: int = MAX_MADE_BYTES) -> Rules:
    """Read rules.

    Args:
        reader: at their beginning.
        most_nbytes: that what they stand for may take.

    Raises:
        WireError: the bytes are none, or say what rules cannot.
    """
    try:
        groups = tuple(_read_group(reader) for _ in range(reader.count(24, MAX_ITEMS)))
        made = 0
        for group in groups:
            made += _made_nbytes(group)
            if made > most_nbytes:
                raise WireError(f"rules are told that stand for {made} bytes or more, and the most are {most_nbytes}")
        return Rules.of_groups(groups)
    except WireError:
        raise
    except TricommError as error:
        raise WireError(f"rules are told that are none: {error}") from error


# ---- index variables


def _write_values(writer: Writer, values: Values | Table) -> None:
    match values:
        case range():
            writer.code(RANGE)
            for edge in (values.start, values.stop, values.step):
                write_number(writer, edge)
        case Table():
            writer.code(TABLE).integer(len(values.items))
            for key, value in values.items:
                write_value(writer, key)
                write_value(writer, value)
        case _:
            writer.code(LISTED).integer(len(values))
            for value in values:
                write_value(writer, value)


def _read_values(reader: Reader) -> Values | Table:
    kind = reader.code()
    if kind == RANGE:
        start, stop, step = (reader.integer() for _ in range(3))
        if step == 0 or abs(stop - start) > HIGHEST:
            raise WireError(f"range({start}, {stop}, {step}) is none; the peer is broken")
        return range(start, stop, step)
    if kind == TABLE:
        return Table(tuple((_read_index(reader), _read_index(reader)) for _ in range(reader.count(4, MAX_ITEMS))))
    if kind != LISTED:
        raise WireError(f"{kind} is no kind of index values; the peer is broken")
    return tuple(_read_index(reader) for _ in range(reader.count(2, MAX_ITEMS)))


def _read_index(reader: Reader) -> int | str:
    value = read_value(reader)
    if isinstance(value, float):
        raise WireError(f"{value} is no value of an index; the peer is broken")
    return value


def _read_group(reader: Reader) -> Group:
    indices: dict[str, Values | Table] = {}
    for _ in range(reader.count(5, MAX_ITEMS)):
        name = reader.text()
        if name in indices:
            raise WireError(f"index {name!r} is told twice; the peer is broken")
        indices[name] = _read_values(reader)
    definitions = tuple((reader.text(), _read(reader)) for _ in range(reader.count(6, MAX_ITEMS)))
    drop = tuple(_read_dropped(reader) for _ in range(reader.count(5, MAX_ITEMS)))
    return Group(definitions, drop, Scope(tuple(indices.items())))


def _read_dropped(reader: Reader) -> str | Expression:
    kind = reader.code()
    if kind not in (PATTERN, REGION):
        raise WireError(f"{kind} is nothing that can be dropped; the peer is broken")
    return reader.text() if kind == PATTERN else _read(reader)


# ---- what they stand for


def _made_nbytes(group: Group) -> int:
    """Count what a group stands for, without making it."""
    longest = max([20, *(len(word) for word in _words(group.scope))])
    lines = [*group.definitions, *((what if isinstance(what, str) else "", what) for what in group.drop)]
    total = 0
    for target, what in lines:
        of_one = _name_nbytes(target, longest)
        if isinstance(what, Expression):
            of_one += _node_nbytes(what, group.scope, longest)
        total += of_one * prod(_count(group.scope, name) for name in variables(target or what))
    return total


def _words(scope: Scope) -> Iterator[str]:
    for _, values in scope.indices:
        if isinstance(values, Table):
            yield from (word for item in values.items for word in item if isinstance(word, str))
        elif isinstance(values, tuple):
            yield from (word for word in values if isinstance(word, str))


def _name_nbytes(template: str, longest: int) -> int:
    return len(template) + longest * len(references(template))


def _node_nbytes(what: Expression | Each, scope: Scope, longest: int) -> int:
    if isinstance(what, Each):
        return _count(scope, what.variable) * _node_nbytes(what.of, scope, longest)
    name = _name_nbytes(what.name, longest) if isinstance(what, Source) else 0
    return NODE_BYTES + name + sum(_node_nbytes(child, scope, longest) for child in what._children())


def _count(scope: Scope, variable: str) -> int:
    return len(scope.values(variable))


# ---- expressions


def _write(writer: Writer, what: Expression | Each, depth: int) -> None:
    if depth == 0:
        raise SpecError(f"an expression has more than {MAX_DEPTH} within each other; write one cat() of many parts")
    match what:
        case Source(name=name, shape=shape):
            write_name(writer.code(SOURCE), name)
            write_optional(writer, shape)
        case Filled(value=value, shape=shape):
            write_value(writer.code(FILLED), value)
            write_numbers(writer, shape)
        case Joined(dim=dim):
            write_number(writer.code(STACK if what.stacks else CAT), dim)
            writer.integer(len(what.parts))
        case Each(variable=variable):
            write_name(writer.code(EACH), variable)
        case _:
            _write_step(writer, what)
    children = (what.of,) if isinstance(what, Each) else what._children()
    for child in children:
        _write(writer, child, depth - 1)


def _write_step(writer: Writer, what: Expression) -> None:
    """The fields of one that has one expression within."""
    match what:
        case Indexed(index=index):
            writer.code(INDEXED).integer(len(index))
            for entry in index:
                _write_entry(writer, entry)
        case Unflattened(dim=dim, sizes=sizes):
            write_number(writer.code(UNFLATTENED), dim)
            write_numbers(writer, sizes)
        case Flattened(start=start, end=end):
            write_number(writer.code(FLATTENED), start)
            write_number(writer, end)
        case Permuted(dims=dims):
            write_numbers(writer.code(PERMUTED), dims)
        case Expanded(sizes=sizes):
            write_numbers(writer.code(EXPANDED), sizes)
        case Cast(dtype=dtype):
            write_name(writer.code(CAST), dtype)
        case _:
            raise AssertionError(f"{what!r} is no node of the algebra")


def _read(reader: Reader) -> Expression:
    found = _read_node(reader, MAX_DEPTH)
    if not isinstance(found, Expression):
        raise WireError("each() is told where no cat() or stack() is around it; the peer is broken")
    return found


def _read_node(reader: Reader, depth: int) -> Expression | Each:
    if depth == 0:
        raise WireError(f"an expression has more than {MAX_DEPTH} within each other; the peer is broken")
    kind = reader.code()
    made: Expression
    if kind == SOURCE:
        made = Source(reader.text(), read_optional(reader))
    elif kind == FILLED:
        made = Filled(read_filling(reader), reader.integers(MAX_DIMS))
    elif kind in (CAT, STACK):
        dim = reader.integer()
        parts = tuple(_read_node(reader, depth - 1) for _ in range(reader.count(2, MAX_ITEMS)))
        made = Joined(parts, dim, kind == STACK)
    elif kind == EACH:
        variable, of = reader.text(), _read_node(reader, depth - 1)
        if not isinstance(of, Expression):
            raise WireError("each() is told within each(), which nobody can write; the peer is broken")
        return Each(variable, of)
    else:
        made = _read_step(reader, kind, depth)
    return _bounded(made)


def _read_step(reader: Reader, kind: int, depth: int) -> Expression:
    """One of those that have one expression within."""

    def of() -> Expression:
        found = _read_node(reader, depth - 1)
        if not isinstance(found, Expression):
            raise WireError("each() is told where no cat() or stack() is around it; the peer is broken")
        return found

    if kind == INDEXED:
        index = tuple(_read_entry(reader) for _ in range(reader.count(1, 2 * MAX_DIMS)))
        return Indexed(of(), index)
    if kind == UNFLATTENED:
        dim, sizes = reader.integer(), reader.integers(MAX_DIMS)
        return Unflattened(of(), dim, sizes)
    if kind == FLATTENED:
        start, end = reader.integer(), reader.integer()
        return Flattened(of(), start, end)
    if kind in (PERMUTED, EXPANDED):
        numbers = reader.integers(MAX_DIMS)
        return Permuted(of(), numbers) if kind == PERMUTED else Expanded(of(), numbers)
    if kind == CAST:
        dtype = reader.text()
        return of().to(dtype)
    raise WireError(f"{kind} is no kind of an expression; the peer is broken")


def _bounded(made: Expression) -> Expression:
    """Refuse sizes that no tensor has, before they are multiplied with each other again."""
    shape: Sequence[int] = made.shape or ()
    if len(shape) > MAX_DIMS or max(shape, default=0) > HIGHEST:
        raise WireError(f"an expression has {len(shape)} dims, or one of more than {HIGHEST}; the peer is broken")
    return made


# ---- entries of an index


def _write_entry(writer: Writer, entry: Entry) -> None:
    match entry:
        case None:
            writer.code(NEW)
        case Span():
            writer.code(SPAN)
            for edge in entry:
                writer.code(edge is not None)
                if edge is not None:
                    write_number(writer, edge)
        case str():
            write_name(writer.code(VARIABLE), entry)
        case int():
            write_number(writer.code(POSITION), entry)
        case _:
            writer.code(ELLIPSIS)


def _read_entry(reader: Reader) -> Entry:
    kind = reader.code()
    if kind == NEW:
        return None
    if kind == ELLIPSIS:
        return ...
    if kind == SPAN:
        start, stop, step = (reader.integer() if reader.code() else None for _ in range(3))
        if step is not None and step < 1:
            raise WireError(f"a slice has step {step}, and steps are at least 1; the peer is broken")
        return Span(start, stop, step)
    if kind == POSITION:
        return reader.integer()
    if kind != VARIABLE:
        raise WireError(f"{kind} is no kind of an entry of an index; the peer is broken")
    variable = reader.text()
    if len(references(variable)) != 1 or not (variable.startswith("{") and variable.endswith("}")):
        raise WireError(f"{variable!r} is no index variable; the peer is broken")
    return variable
