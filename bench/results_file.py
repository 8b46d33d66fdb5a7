"""A benchmark's file of results, to which each run adds its cases."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar


class HasCase(Protocol):
    """A row of a table."""

    @property
    def case(self) -> Any:
        """What its methods have in common; rows of a case are measured together."""
        ...


RowT = TypeVar("RowT", bound=HasCase)


def earlier(path: Path, set_up: Mapping[str, Any]) -> dict[str, Any]:
    """What the file has, if that was measured in the same set-up; else an empty one."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    is_same = all(found.get(key) == value for key, value in set_up.items())
    return found if found and is_same else {"rows": []}


def other_rows(content: Mapping[str, Any], kind: type[RowT], rows: Iterable[RowT]) -> list[RowT]:
    """The rows of the file's content whose case is not that of any new row."""
    new = {row.case for row in rows}
    found = [
        kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        for fields in content["rows"]
    ]
    return [row for row in found if row.case not in new]
