"""Names, shapes, dtypes and holdings of tensors as bytes: what one side tells the others.

    meshes    (axes: name, size ...; ranks ...) ...      each once
    layouts   (mesh; placements or holdings) ...         each once
    tensors   (name; layout; dtype; shape) ...

Ranks are those of the side that tells; ``placed`` makes them ranks of a group.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tricomm.connect.meeting.wire import Reader, WireError, Writer
from tricomm.connect.told.words import MAX_DIMS, NONE, read_optional, write_name, write_optional
from tricomm.errors import SpecError, TricommError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial, Placement, Replicate, Shard
from tricomm.layout.spec import Holding, ShardingSpec

MAX_SPECS_BYTES = 64 << 20
MAX_TENSORS = 1 << 20
MAX_RANKS = 1 << 20

Specs = Mapping[str, ShardingSpec]
Layout = tuple[int, tuple[Placement, ...], tuple[int, ...] | None, tuple[Holding, ...] | None]
"""Of a spec without its shape and dtype: number of the mesh, placements, axis_order, holdings."""


def encode_specs(specs: Specs) -> bytes:
    """Return the layouts of tensors as bytes, the same for the same layouts.

    Raises:
        SpecError: more than can be told.
    """
    meshes: dict[tuple[Any, ...], int] = {}
    layouts: dict[Layout, int] = {}
    tensors = Writer().integer(len(specs))
    for name in sorted(specs):
        spec = specs[name]
        mesh = meshes.setdefault((spec.mesh.shape, spec.mesh.axis_names, spec.mesh.ranks), len(meshes))
        layout = (mesh, spec.placements, spec.axis_order, spec.holdings)
        write_name(tensors, name)
        tensors.integer(layouts.setdefault(layout, len(layouts))).text(spec.dtype or "")
        write_optional(tensors, spec.shape)
    writer = Writer().integer(len(meshes))
    for shape, names, ranks in meshes:
        writer.integer(len(names))
        for name in names:
            write_name(writer, name)
        writer.integers(shape).integers(ranks)
    writer.integer(len(layouts))
    for layout in layouts:
        _write_layout(writer, layout)
    found = writer.done() + tensors.done()
    if len(found) > MAX_SPECS_BYTES or len(specs) > MAX_TENSORS:
        raise SpecError(
            f"the layouts of {len(specs)} tensors are {len(found)} bytes; the most are {MAX_TENSORS} tensors and "
            f"{MAX_SPECS_BYTES} bytes, so exchange them in parts"
        )
    return found


def decode_specs(data: bytes) -> dict[str, ShardingSpec]:
    """Read layouts of tensors.

    Raises:
        WireError: the bytes are none, or say what no layout can.
    """
    reader = Reader(data)
    try:
        meshes = [_read_mesh(reader) for _ in range(reader.count(24))]
        layouts = [_read_layout(reader, len(meshes)) for _ in range(reader.count(24))]
        found: dict[str, ShardingSpec] = {}
        for _ in range(reader.count(24, MAX_TENSORS)):
            name, layout = reader.text(), layouts[reader.integer(0, len(layouts) - 1)]
            dtype, shape = reader.text() or None, read_optional(reader, MAX_DIMS)
            number, placements, axis_order, holdings = layout
            if name in found:
                raise WireError(f"tensor {name!r} is told twice")
            found[name] = ShardingSpec(meshes[number], placements, shape, dtype, axis_order, holdings=holdings)
    except WireError:
        raise
    except TricommError as error:
        raise WireError(f"a layout is told that is none: {error}") from error
    reader.end()
    return found


def placed(specs: Specs, first: int, side: str, size: int) -> dict[str, ShardingSpec]:
    """Return layouts on the ranks of a group.

    Args:
        specs: on the ranks of a side, from 0.
        first: the rank in the group of the side's rank 0.
        side, size: of the side.

    Raises:
        SpecError: a layout names a rank that the side has not.
    """
    meshes: dict[tuple[Any, ...], Mesh] = {}
    found = {}
    for name, spec in specs.items():
        mesh = spec.mesh
        if max(mesh.ranks) >= size:
            raise SpecError(
                f"tensor {name!r} of side {side!r} is on {mesh}, and the side has {size} ranks; number them from 0, "
                "as if there were no other side"
            )
        key = (mesh.shape, mesh.axis_names, mesh.ranks)
        if key not in meshes:
            meshes[key] = Mesh((np.array(mesh.ranks) + first).reshape(mesh.shape), mesh.axis_names)
        found[name] = replace(spec, mesh=meshes[key])
    return found


def _write_layout(writer: Writer, layout: Layout) -> None:
    mesh, placements, axis_order, holdings = layout
    writer.integer(mesh).integer(len(placements))
    for placement in placements:
        match placement:
            case Shard():
                write_optional(writer.text("S").integer(placement.dim), placement.segments)
            case Replicate():
                writer.text("R")
            case Partial():
                writer.text("P").text(placement.op)
    write_optional(writer, axis_order)
    writer.integer(NONE if holdings is None else len(holdings))
    for holding in holdings or ():
        writer.integer(len(holding))
        for intervals in holding:
            writer.integers([edge for interval in intervals for edge in interval])


def _read_layout(reader: Reader, meshes: int) -> Layout:
    mesh = reader.integer(0, meshes - 1)
    placements = tuple(_read_placement(reader) for _ in range(reader.count(5, MAX_DIMS)))
    axis_order = read_optional(reader, MAX_DIMS)
    count = reader.integer(NONE, MAX_RANKS)
    if count == NONE:
        return mesh, placements, axis_order, None
    return mesh, (), None, tuple(_read_holding(reader) for _ in range(count))


def _read_holding(reader: Reader) -> Holding:
    found = []
    for _ in range(reader.count(8, MAX_DIMS)):
        edges = reader.integers()
        if len(edges) % 2:
            raise WireError(f"{len(edges)} edges are not pairs of (start, stop)")
        found.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
    return tuple(found)


def _read_placement(reader: Reader) -> Placement:
    kind = reader.text(1)
    if kind == "S":
        dim, segments = reader.integer(), read_optional(reader, MAX_RANKS)
        return Shard(dim, segments)
    if kind == "P":
        return Partial(reader.text(16))
    if kind != "R":
        raise WireError(f"{kind!r} is no placement")
    return Replicate()


def _read_mesh(reader: Reader) -> Mesh:
    names, shape, ranks = reader.texts(), reader.integers(MAX_DIMS), reader.integers(MAX_RANKS)
    if min(shape, default=1) < 1 or math.prod(shape) != len(ranks) or len(names) != len(shape) or len(shape) > 32:
        raise WireError(f"{len(ranks)} ranks are no mesh of shape {shape}")
    if any(not 0 <= rank < MAX_RANKS for rank in ranks):
        raise WireError(f"a mesh has a rank beyond {MAX_RANKS}")
    return Mesh(np.array(ranks).reshape(shape), names)
