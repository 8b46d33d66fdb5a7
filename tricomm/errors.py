"""The errors that tricomm raises.

    TricommError
      SpecError       (ValueError)    a mesh, a layout, a tensor or an option does not say what the rules allow
        ArgumentError (TypeError)     it is not even of the right kind: a word for a number, a misspelt option
      PlanError       (ValueError)    two valid layouts cannot be planned as asked, or a pipeline cannot run
      TransportError  (RuntimeError)  ranks disagree, or one died, stopped or never came

Every message names the value, the rule that it breaks and the remedy.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TricommError(Exception):
    """Base of everything that tricomm raises on purpose.

    Example:
        >>> from tricomm import Shard
        >>> try:
        ...     Shard("rows")
        ... except TricommError as error:
        ...     print(error)
        Shard(dim='rows'): dim must be an integer; name one tensor dim
    """


class SpecError(TricommError, ValueError):
    """A mesh, a sharding spec, a local tensor or an option breaks a rule; nothing has been sent.

    Example:
        >>> from tricomm import Mesh
        >>> Mesh([0, 0], ("tp",))
        Traceback (most recent call last):
        tricomm.errors.SpecError: rank 0 stands twice in the mesh; a rank may hold one place only, so name it once
    """


class ArgumentError(SpecError, TypeError):
    """An argument is of the wrong kind, or there is no option of that name; nothing has been sent.

    Example:
        >>> from tricomm import Topology
        >>> Topology.flat("two")
        Traceback (most recent call last):
        tricomm.errors.ArgumentError: ranks='two' is not a number of ranks; write an integer above 0
    """


class PlanError(TricommError, ValueError):
    """Two valid specs cannot be planned as asked, or a pipeline's schedule cannot run; nothing has been sent.

    Example:
        >>> from tricomm import SendRecv
        >>> SendRecv(chunk_bytes=0)
        Traceback (most recent call last):
        tricomm.errors.PlanError: chunk_bytes=0 must be a positive number of bytes, or None to choose
    """


class TransportError(TricommError, RuntimeError):
    """The ranks disagree about a call, or one of them died, stopped or never called.

    Example:
        >>> try:
        ...     raise TransportError("rank 3 did not call within the timeout")
        ... except TricommError as error:
        ...     print(type(error).__name__, "-", error)
        TransportError - rank 3 did not call within the timeout
    """


MAX_SHOWN = 120
"""Characters of a value that an error shows."""


def shown(value: object) -> str:
    """Return the repr of whatever a caller gave, cut; words where it has none, as of what holds itself or is broken.

    >>> shown("x" * 200) == "'" + "x" * 119 + "..."
    True
    """
    try:
        text = repr(value)
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def check_count(name: str, value: object, least: int, rule: str) -> None:
    """Refuse a number of something that is none, or too small.

    Args:
        name, value: of the argument.
        least: that it may be.
        rule: what it must be, in words, with the remedy.

    Raises:
        ArgumentError: not an integer.
        PlanError: less.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{name}={shown(value)} must be {rule}")
    if value < least:
        raise PlanError(f"{name}={shown(value)} must be {rule}")


NEAREST = 0.62
"""How alike a name and the one that is meant must at least be: "out" is not "timeout"."""


def check_text(what: str, value: str) -> None:
    """Refuse a string that cannot be written or sent, as half of a surrogate pair is in it.

    Raises:
        SpecError: it cannot.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{what}={shown(value)} is no text, as the character at {error.start} is half of a surrogate pair; "
            "write another"
        ) from error


def describe_unknown(name: str, caller: str, names: Iterable[str]) -> str:
    """Say that a caller has no keyword of that name, and which one is meant."""
    known = list(names)
    nearest = get_close_matches(name, known, 1, NEAREST)
    remedy = f"write {nearest[0]}=..." if nearest else f"its options are {', '.join(known)}"
    return f"{caller} has no option {name!r}; {remedy}"
