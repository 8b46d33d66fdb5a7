"""The paper's letters for a layout: one entry per tensor dim, "R" or "S" with the mesh axes that cut it."""

from collections.abc import Callable, Sequence

from tricomm.errors import SpecError
from tricomm.layout.intervals import Region
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial, Placement, Replicate, Shard


def from_notation(mesh: Mesh, dims: Sequence[str]) -> tuple[tuple[Placement, ...], tuple[int, ...]]:
    """(placements, axis order) of entries such as ("S01", "R", "S2").

    Raises:
        SpecError: an entry that is neither "R" nor "S" with digits, or an axis that is missing or used twice.
    """
    if isinstance(dims, str):
        raise SpecError(f'dims={dims!r} is one string; write one entry per tensor dim: ("S0", "R")')
    placements: list[Placement] = [Replicate()] * mesh.ndim
    order: list[int] = []
    for dim, entry in enumerate(dims):
        if entry == "R":
            continue
        if not isinstance(entry, str) or not entry.startswith("S") or not entry[1:].isdecimal():
            raise SpecError(
                f'entry {entry!r} of dims={tuple(dims)} is neither "R" nor "S" with mesh axes; write "S01" for a dim '
                "that axis 0 cuts first and axis 1 second"
            )
        for digit in entry[1:]:
            axis = int(digit)
            if axis >= mesh.ndim:
                raise SpecError(
                    f"entry {entry!r} names mesh axis {axis}, but {mesh} has axes 0 to {mesh.ndim - 1}; use one of them"
                )
            if axis in order:
                raise SpecError(
                    f"dims={tuple(dims)} use mesh axis {axis} twice; an axis can cut one dim only, so name it once"
                )
            placements[axis] = Shard(dim)
            order.append(axis)
    rest = [axis for axis in range(mesh.ndim) if axis not in order]
    return tuple(placements), (*order, *rest)


def to_notation(
    mesh: Mesh,
    placements: tuple[Placement, ...],
    cutting_axes: Callable[[int], tuple[int, ...]],
    shape: tuple[int, ...] | None,
    holdings: tuple[Region, ...] | None,
) -> str:
    """The letters of a layout; segments stand in braces, contributions as ``+sum(1)`` behind the dims."""
    if holdings is not None:
        return "explicit"
    if shape is None and any(isinstance(p, Shard) and p.dim < 0 for p in placements):
        return repr(placements)  # which dims are meant is known with the shape
    shards = [placement for placement in placements if isinstance(placement, Shard)]
    ndim = len(shape) if shape is not None else 1 + max((s.dim for s in shards), default=-1)
    words: list[str] = []
    for dim in range(ndim):
        axes = cutting_axes(dim)
        words.append("S" + "".join(_letters(axis, placements[axis]) for axis in axes) if axes else "R")
    for axis, placement in enumerate(placements):
        if isinstance(placement, Partial):
            words.append(f"+{placement.op}({axis})")
    return " ".join(words) if words else "scalar"


def _letters(axis: int, placement: Placement) -> str:
    """An axis that cuts, with its segments: "1{2,6}"."""
    segments = placement.segments if isinstance(placement, Shard) else None
    return str(axis) if segments is None else f"{axis}{{{','.join(map(str, segments))}}}"
