"""pack and unpack: boxes of many tensors into or out of packed buffers, in one launch.

(One for all boxes that keep their order; boxes that must be transposed take one more for each size of their units.)
On a CUDA device the Triton kernels of ``jit`` move them, elsewhere the torch code of ``reference``, which is also the
definition. A launch waits for nothing, and can be captured in a CUDA graph once the table is on the device.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tricomm.kernels import layout, reference
from tricomm.kernels.boxes import Boxes, Columns
from tricomm.kernels.device import Bound, Side, span_nbytes
from tricomm.kernels.rows import make_rows
from tricomm.kernels.sides import Sides
from tricomm.kernels.tiles import Rows
from tricomm.kernels.variants import Variant


class Table:
    """Boxes, and what a device has of them. Made once, uploaded when first used and when something has moved.

    Args:
        boxes: which parts of which tensors go where.
        cast: (dtype of the tensors, dtype of the buffers) if elements are cast, else None: then all dtypes move as
            bits.
        multiprocessors: how many of the device's a launch may use, so that others have the rest; None is all.

    Raises:
        ValueError: a cast that no kernel has, or less than one multiprocessor.
    """

    def __init__(
        self,
        boxes: Boxes,
        *,
        cast: tuple[torch.dtype, torch.dtype] | None = None,
        multiprocessors: int | None = None,
    ) -> None:
        if cast is not None and not casts(*cast):
            raise ValueError(
                f"no kernel casts {cast[0]} to {cast[1]}: the types are {', '.join(layout.FORMATS)}, and two different "
                "ones are wanted; use torch's copy_ for others, and cast=None to move bits"
            )
        if multiprocessors is not None and multiprocessors < 1:
            raise ValueError(f"multiprocessors={multiprocessors} must be at least 1, or None for all of them")
        self.boxes = boxes
        self.cast = cast
        self.multiprocessors = multiprocessors
        self.tensor_reach = boxes.reach_nbytes(packed=False)
        self.buffer_reach = boxes.reach_nbytes(packed=True)
        self._bound: dict[bool, Bound] = {}

    def rows(
        self,
        packs: bool,
        tensor_bases: Sequence[int],
        buffer_bases: Sequence[int],
        words_per_tile: int | None = None,
    ) -> tuple[Rows, ...]:
        """The rows of each launch.

        Args:
            packs: the direction.
            tensor_bases, buffer_bases: addresses. Where there is one, rows count from it; where there are several,
                rows hold addresses.
            words_per_tile: None is what fits.
        """
        boxes = self.boxes
        tensor = _side(boxes.tensor_strides, boxes.tensor_place, boxes.tensor, tensor_bases)
        packed = _side(boxes.packed_strides, boxes.packed_place, boxes.buffer, buffer_bases)
        itemsizes = None if self.cast is None else (self.cast[0].itemsize, self.cast[1].itemsize)
        if not packs:
            tensor, packed = packed, tensor
            itemsizes = None if itemsizes is None else itemsizes[::-1]
        columns = [column for pair in zip(tensor, packed, strict=True) for column in pair]
        sides = Sides(np.ascontiguousarray(boxes.shape.T[::-1]), *columns)
        persistent = self.multiprocessors is not None
        every: tuple[Rows, ...] = make_rows(sides, boxes.tensor_itemsize, itemsizes, persistent, words_per_tile)
        return every

    def variant(self, rows: Rows, packs: bool) -> Variant:
        """The kernel that does some rows."""
        persistent = self.multiprocessors is not None
        of_rows: dict[str, Any] = {"program": rows.program, "kind": rows.kind, "is_shared": rows.shared is not None}
        if rows.transposed_nbytes:
            nbytes = rows.transposed_nbytes
            return Variant(rows.rank, persistent, transposed_nbytes=nbytes, side=rows.side, **of_rows)
        if self.cast is None:
            return Variant(rows.rank, persistent, **of_rows)
        tensor, packed = (_name(dtype) for dtype in self.cast)
        formats = (tensor, packed) if packs else (packed, tensor)
        saturates = formats[1] == "float8_e4m3fn" and torch_saturates()
        return Variant(rows.rank, persistent, formats, saturates, **of_rows)

    def launch(self, packs: bool, tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        """Pack or unpack on the CUDA device where the tensors are."""
        device = buffers[0].device
        stream = torch.cuda.current_stream(device)
        with torch.cuda.device(device):
            bound = self._bound.get(packs)
            if bound is None or bound.device != device or not bound.is_of(tensors, buffers):
                bound = self._bind(packs, tensors, buffers, stream)
            bound.launch(packs, tensors, buffers, stream)

    def _bind(
        self, packs: bool, tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], stream: torch.cuda.Stream
    ) -> Bound:
        """Make the rows for where everything is now, and start their upload."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the table is not on the device yet, or a tensor has moved since it was uploaded, and an upload cannot "
                "be captured in a CUDA graph; pack or unpack once with the same tensors before the capture"
            )
        self.check(tensors, buffers)
        sides = Side(tensors, self.tensor_reach), Side(buffers, self.buffer_reach)
        every = self.rows(packs, sides[0].addresses, sides[1].addresses)
        variants = [self.variant(rows, packs) for rows in every]
        bound = Bound(buffers[0].device, every, variants, *sides, self.multiprocessors, stream)
        self._bound[packs] = bound
        return bound

    def check(self, tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        """Refuse tensors and buffers that the boxes do not fit into.

        Raises:
            ValueError: their number, device, dtype or size is not what the table is for.
        """
        for what, given, reach, dtype in (
            ("tensor", tensors, self.tensor_reach, None if self.cast is None else self.cast[0]),
            ("buffer", buffers, self.buffer_reach, None),
        ):
            if len(given) < len(reach):
                raise ValueError(f"the table has boxes of {len(reach)} {what}s, and {len(given)} were given; give all")
            for index, (tensor, nbytes) in enumerate(zip(given, reach, strict=False)):
                if tensor.device != buffers[0].device:
                    raise ValueError(
                        f"{what} {index} is on {tensor.device} and buffer 0 on {buffers[0].device}; one launch "
                        "needs one device"
                    )
                if dtype is not None and tensor.dtype != dtype:
                    raise ValueError(f"{what} {index} is {tensor.dtype}, and the table casts {dtype}; give that")
                if span_nbytes(tensor) < nbytes:
                    raise ValueError(
                        f"{what} {index} spans {span_nbytes(tensor)} bytes, and the table's boxes reach to byte "
                        f"{nbytes}; give the one that it was made for"
                    )


def pack(tensors: Sequence[torch.Tensor], table: Table, out: torch.Tensor | Sequence[torch.Tensor]) -> None:
    """Copy the boxes of a table out of tensors into packed buffers.

    Args:
        tensors: any shapes, with the strides that the table was made for.
        table: the boxes.
        out: one buffer, or as many as the boxes name; each is written from its first element on, as far as its boxes
            say, and not in the gaps between them. Its dtype does not matter.

    Raises:
        ValueError: tensors or buffers that the boxes do not fit into.
    """
    buffers = (out,) if isinstance(out, torch.Tensor) else out
    if not len(table.boxes):
        return
    if runs_kernels(buffers[0].device):
        table.launch(True, tensors, buffers)
    else:
        table.check(tensors, buffers)
        reference.pack(tensors, table, buffers)


def unpack(buffer: torch.Tensor | Sequence[torch.Tensor], table: Table, tensors: Sequence[torch.Tensor]) -> None:
    """Copy the boxes of a table out of packed buffers into tensors; the reverse of :func:`pack`.

    Boxes must not overlap in the tensors, and no element of them may be one with another (stride 0).
    """
    buffers = (buffer,) if isinstance(buffer, torch.Tensor) else buffer
    if not len(table.boxes):
        return
    if runs_kernels(buffers[0].device):
        table.launch(False, tensors, buffers)
    else:
        table.check(tensors, buffers)
        reference.unpack(buffers, table, tensors)


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels move what is on a device."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def serves(device: torch.device, tensor_dtype: torch.dtype, packed_dtype: torch.dtype) -> bool:
    """Whether kernels move elements between two types, which may be one, on a device."""
    return runs_kernels(device) and (tensor_dtype == packed_dtype or casts(tensor_dtype, packed_dtype))


def casts(first: torch.dtype, second: torch.dtype) -> bool:
    """Whether the kernels cast between two element types."""
    return first != second and _name(first) in layout.FORMATS and _name(second) in layout.FORMATS


@cache
def torch_saturates() -> bool:
    """Whether this torch casts what is too large for float8_e4m3fn to its largest value: 2.13 does, 2.11 makes NaN."""
    return bool(torch.tensor(1e9).to(torch.float8_e4m3fn).float().isfinite())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _side(strides: Columns, place: Columns, which: Columns, bases: Sequence[int]) -> tuple[Columns, Columns, Columns]:
    """(strides with dims first and innermost first, places, bases) of one side, in bytes."""
    turned = np.ascontiguousarray(strides.T[::-1])
    if len(bases) == 1:
        return turned, place, np.full(len(place), bases[0] % layout.VECTOR_NBYTES)
    return turned, place + np.array(bases, np.int64)[which], np.zeros(len(place), np.int64)
