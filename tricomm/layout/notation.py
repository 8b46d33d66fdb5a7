"""Layouts as text: the paper's letters, which are read and written, and extents with axis names, which are printed.

The letters give one entry per tensor dim, "R" or "S" with the numbers of the mesh axes that cut it.
"""

from collections.abc import Callable, Sequence

from tricomm.errors import ArgumentError, SpecError, shown
from tricomm.layout.intervals import Region
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial, Placement, Replicate, Shard


def from_notation(mesh: Mesh, dims: Sequence[str]) -> tuple[tuple[Placement, ...], tuple[int, ...]]:
    """Read entries such as ("S01", "R", "S2"): (placements, axis order).

    Raises:
        SpecError: an entry that is neither "R" nor "S" with digits, or an axis that is missing or used twice.
    """
    if isinstance(dims, str):
        raise ArgumentError(f'dims={shown(dims)} is one string; write one entry per tensor dim: ("S0", "R")')
    if not isinstance(dims, Sequence):
        raise ArgumentError(f'dims={shown(dims)} is not a tuple of entries; write one per tensor dim: ("S0", "R")')
    placements: list[Placement] = [Replicate()] * mesh.ndim
    order: list[int] = []
    for dim, entry in enumerate(dims):
        if entry == "R":
            continue
        if not isinstance(entry, str) or not entry.startswith("S") or not entry[1:].isdecimal():
            raise SpecError(
                f'entry {shown(entry)} of dims={shown(tuple(dims))} is neither "R" nor "S" with mesh axes; write "S01" '
                "for a dim that axis 0 cuts first and axis 1 second"
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
    """Write a layout in letters; segments stand in braces, contributions as ``+sum(1)`` behind the dims."""
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


def describe_layout(
    mesh: Mesh,
    placements: tuple[Placement, ...],
    cutting_axes: Callable[[int], tuple[int, ...]],
    shape: tuple[int, ...] | None,
    is_explicit: bool,
) -> str:
    """Write a layout as its extents, each over the axes that cut it, first cut first; then what the other axes do.

    ``[8/dp/tp, 6] on ...``: dim 0, of 8, is cut by dp and each part by tp. ``[6/tp{4,2}]``: segments of 4 and 2, each
    cut by tp. ``replicated over dp``, ``sum over dp``: what the axes do that cut nothing.
    """
    names = mesh.axis_names
    if is_explicit:
        assert shape is not None
        return f"{list(shape)} explicit"
    shards = [placement for placement in placements if isinstance(placement, Shard)]
    if shape is None and any(shard.dim < 0 for shard in shards):
        # Which dims are meant is known with the shape.
        axes = ", ".join(f"{name}: {placement!r}" for name, placement in zip(names, placements, strict=True))
        return f"[...] {axes}"
    ndim = len(shape) if shape is not None else 1 + max((shard.dim for shard in shards), default=-1)
    extents = []
    for dim in range(ndim):
        cuts = "".join("/" + names[axis] + _braced(placements[axis]) for axis in cutting_axes(dim))
        extents.append(("?" if shape is None else str(shape[dim])) + cuts)
    if shape is None:
        extents.append("...")
    words = [f"[{', '.join(extents)}]"]
    words += [f"{p.op} over {name}" for name, p in zip(names, placements, strict=True) if isinstance(p, Partial)]
    replicated = [name for name, p in zip(names, placements, strict=True) if isinstance(p, Replicate)]
    if replicated:
        words.append(f"replicated over {' and '.join(replicated)}")
    return " ".join(words)


def _letters(axis: int, placement: Placement) -> str:
    """Write an axis that cuts, with its segments: "1{2,6}"."""
    return f"{axis}{_braced(placement)}"


def _braced(placement: Placement) -> str:
    """Write the segments of a Shard: "{2,6}"; nothing where there are none."""
    segments = placement.segments if isinstance(placement, Shard) else None
    return "" if segments is None else f"{{{','.join(map(str, segments))}}}"
