"""Arguments of the wrong kind, refused at the door by what the signature says.

A public function that would end in an error of Python's own (a word where a number is meant, a Shard where a spec is)
is decorated with :func:`checks_kinds`: what it is given is compared with its annotations before it begins.
"""

import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, wraps
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from tricomm.errors import ArgumentError, TricommError, describe_unknown, shown

T = TypeVar("T", bound=Callable[..., Any])
C = TypeVar("C")

MAX_ITEMS = 1000
"""Of a sequence so many items are looked at."""


class Expected(NamedTuple):
    """What an annotation allows.

    Attributes:
        is_of: whether a value is of the kind.
        words: the kind, as "an integer".
    """

    is_of: Callable[[Any], bool]
    words: str


def checks_kinds(function: T) -> T:
    """Refuse arguments that are not of the annotated kinds, with an ArgumentError, before the function begins.

    Containers are looked into where that uses nothing up: sequences, mappings and sets, not iterators.

    Example:
        >>> @checks_kinds
        ... def cut(rows: int, names: Sequence[str] = ()) -> int:
        ...     return rows // 2
        >>> cut(4)
        2
        >>> cut(4, names=["a", 1])
        Traceback (most recent call last):
        tricomm.errors.ArgumentError: cut(names=['a', 1]): names must be a sequence of strings; give one
    """
    wrong_kind = _WrongKind(function)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        error = wrong_kind(args, kwargs)
        if error is not None:
            raise error
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def explains_kinds(function: T) -> T:
    """As :func:`checks_kinds`, once the function has ended in an error of Python's own; for what is called very often.

    The function must change nothing before it fails. Where all kinds are right, the error stands.

    Example:
        >>> @explains_kinds
        ... def half(rows: int) -> int:
        ...     return rows // 2
        >>> half("4")
        Traceback (most recent call last):
        tricomm.errors.ArgumentError: half(rows='4'): rows must be an integer; give one
    """
    wrong_kind = _WrongKind(function)

    @wraps(function)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TricommError:
            raise
        except Exception as error:
            better = wrong_kind(args, kwargs)
            if better is None:
                raise
            raise better from error

    return explained  # type: ignore[return-value]


def explains_fields(cls: type[C]) -> type[C]:
    """As :func:`explains_kinds` for what a dataclass is made from."""
    cls.__init__ = explains_kinds(cls.__init__)  # type: ignore[method-assign]
    return cls


def checks_fields(cls: type[C]) -> type[C]:
    """As :func:`checks_kinds` for what a dataclass is made from: for classes that would keep whatever they are given.

    Example:
        >>> from dataclasses import dataclass
        >>> @checks_fields
        ... @dataclass(frozen=True)
        ... class Cut:
        ...     rows: int
        >>> Cut("4")
        Traceback (most recent call last):
        tricomm.errors.ArgumentError: Cut(rows='4'): rows must be an integer; give one
    """
    cls.__init__ = checks_kinds(cls.__init__)  # type: ignore[method-assign]
    return cls


def refuse_wrong_kinds(function: Callable[..., Any], **given: Any) -> None:
    """Raise for the first argument that is not of the kind that a function's annotations say.

    For functions that must do something else first, such as finding out whom to tell.

    Raises:
        ArgumentError: there is one.
    """
    error = _wrong_kind_of(function).first(given)
    if error is not None:
        raise error


class _WrongKind:
    """Finds the first argument of a call that is not of the annotated kind; what annotations allow is read once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._signature = inspect.signature(function)

    @cached_property
    def _expected(self) -> dict[str, Expected]:
        hints = get_type_hints(self._function)
        expected: dict[str, Expected] = {}
        for name, parameter in self._signature.parameters.items():
            if name in hints and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                expected[name] = kind_of(hints[name])
        return expected

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgumentError | None:
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            return ArgumentError(describe_unbound(self._function, self._signature, args, kwargs) or str(error))
        return self.first(given)

    def first(self, given: Mapping[str, Any]) -> ArgumentError | None:
        """Return the error of the first wrong one among named arguments."""
        for name, value in given.items():
            if name in self._expected and not self._expected[name].is_of(value):
                words = self._expected[name].words
                return ArgumentError(describe_kind(self._function.__qualname__, name, value, words))
        return None


def explains_missing(function: T) -> T:
    """As :func:`explains_kinds` for what checks its arguments itself: says what was forgotten, or is unknown.

    Example:
        >>> @explains_missing
        ... def cut(rows: int, columns: int) -> int:
        ...     return rows // columns
        >>> cut(4)
        Traceback (most recent call last):
        tricomm.errors.ArgumentError: cut(rows=4) lacks columns; write cut(rows=..., columns=...)
    """
    if isinstance(function, type):
        function.__init__ = explains_missing(function.__init__)  # type: ignore[misc]
        return function
    signature = inspect.signature(function)

    @wraps(function)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            if isinstance(error, TricommError):
                raise
            text = describe_unbound(function, signature, args, kwargs)
            if text is None:
                raise
            raise ArgumentError(text) from None

    return explained  # type: ignore[return-value]


def describe_unbound(
    function: Callable[..., Any], signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Say which argument of a call is missing, unknown or too much; None if the call fits the signature."""
    caller = _caller_of(function.__qualname__)
    parameters = {name: one for name, one in signature.parameters.items() if one.kind is not one.VAR_KEYWORD}
    if len(parameters) == len(signature.parameters):
        for name in kwargs:
            if name not in parameters:
                return describe_unknown(name, caller, [one for one in parameters if one not in _OWN])
    named = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    given = {**dict(zip(named, args, strict=False)), **kwargs}
    needed = [
        name for name, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_POSITIONAL
    ]
    missing = [name for name in needed if name not in given]
    if not missing:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            return f"{caller}: {error}; it takes {', '.join(name for name in parameters if name not in _OWN)}"
        return None
    told = ", ".join(f"{name}={shown(value)}" for name, value in given.items() if name not in _OWN)
    words = _words_of(function, missing[0])
    form = ", ".join(f"{name}=..." for name in needed if name not in _OWN)
    return f"{caller}({told}) lacks {' and '.join(missing)}{f': {words}' if words else ''}; write {caller}({form})"


_OWN = ("self", "cls")


def _caller_of(name: str) -> str:
    """What a user calls, by the qualified name of a function."""
    return name.removesuffix(".__init__").rpartition("<locals>.")[2]


def _words_of(function: Callable[..., Any], parameter: str) -> str:
    """The first clause about a parameter in the docstring of a function, or of the class that it makes."""
    owner: Any = inspect.getmodule(function)
    for name in function.__qualname__.removesuffix(".__init__").split("."):
        owner = getattr(owner, name, None)
    found = re.search(rf"^\s*(?:\w+, )*{parameter}(?:, \w+)*: (.*?)[.;:]", inspect.getdoc(owner) or "", re.M | re.S)
    return " ".join(found[1].split()) if found else ""


def describe_kind(caller: str, name: str, value: object, words: str) -> str:
    """Say that an argument is not of the right kind."""
    return f"{_caller_of(caller)}({name}={shown(value)}): {name} must be {words}; give one"


@lru_cache(maxsize=256)
def _wrong_kind_of(function: Callable[..., Any]) -> _WrongKind:
    return _WrongKind(function)


ANYTHING = Expected(lambda _: True, "anything")


def kind_of(hint: Any) -> Expected:
    """Compile an annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin in (Union, UnionType):
        options = [kind_of(argument) for argument in arguments]
        words = " or ".join(option.words for option in options)
        return Expected(lambda value: any(option.is_of(value) for option in options), words)
    if origin is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis):
        return _tuple_of([kind_of(argument) for argument in arguments])
    if origin in (tuple, list, Sequence, Collection, Iterable):
        return _items_of(origin, kind_of(arguments[0]))
    if origin in (dict, Mapping):
        return _mapping_of(*map(kind_of, arguments))
    if origin is Callable:
        return Expected(callable, "a function")
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False) and origin is None:
        article = "an" if hint.__name__[0] in "AEIO" else "a"
        return Expected(lambda value: isinstance(value, hint), f"{article} {hint.__name__}")
    return ANYTHING


def is_integer(value: object) -> bool:
    """Whether a value is one, of Python or of another kind, and not True or False."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and _indexes(value)


def _indexes(value: Any) -> bool:
    if isinstance(value, int):
        return True
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not getattr(value, "shape", ())  # an array of one element is an array


_PLAIN: dict[Any, Expected] = {
    int: Expected(is_integer, "an integer"),
    float: Expected(lambda value: isinstance(value, float) or is_integer(value), "a number"),
    str: Expected(lambda value: isinstance(value, str), "a string"),
    bool: Expected(lambda value: isinstance(value, bool), "True or False"),
    NoneType: Expected(lambda value: value is None, "None"),
    Any: ANYTHING,
    object: ANYTHING,
}


def _plural(words: str) -> str:
    """The words for several: "integers" of "an integer"."""
    for article in ("an ", "a "):
        if words.startswith(article) and " or " not in words:
            noun, space, rest = words.removeprefix(article).partition(" ")
            return f"{noun}{'' if noun.endswith('s') else 's'}{space}{rest}"
    return f"({words})"


def _items_of(origin: Any, item: Expected) -> Expected:
    """A sequence, or what the annotation says; an iterator is not looked into."""
    wanted = origin if origin in (Collection, Iterable) else Sequence

    def is_of(value: Any) -> bool:
        if isinstance(value, str | bytes) or not isinstance(value, wanted):
            return False
        if isinstance(value, Iterator):
            return True
        try:
            return all(item.is_of(one) for one, _ in zip(value, range(MAX_ITEMS), strict=False))
        except (TypeError, RuntimeError):  # an array of no dims
            return False

    name = "tuple" if origin is tuple else "sequence"
    return Expected(is_of, f"a {name} of {_plural(item.words)}" if item is not ANYTHING else f"a {name}")


def _tuple_of(items: Sequence[Expected]) -> Expected:
    def is_of(value: Any) -> bool:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != len(items):
            return False
        return all(item.is_of(one) for item, one in zip(items, value, strict=True))

    return Expected(is_of, f"a tuple ({', '.join(item.words for item in items)})")


def _mapping_of(key: Expected, item: Expected) -> Expected:
    def is_of(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        pairs = zip(value.items(), range(MAX_ITEMS), strict=False)
        return all(key.is_of(one) and item.is_of(other) for (one, other), _ in pairs)

    return Expected(is_of, f"a mapping of {_plural(key.words)} to {_plural(item.words)}")
