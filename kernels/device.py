"""What a CUDA device has of a table: its rows, where they point, and the compiled kernels that read them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tricomm.kernels import layout
from tricomm.kernels.tiles import Rows
from tricomm.kernels.variants import Variant, compiled


class Side:
    """The tensors, or the buffers, of a table, as it points to them.

    Where there is one, rows count from its first element and it is given anew with each launch: any other does as
    well if its address has the same last four bits. Where there are several, rows hold addresses, and the tensors are
    kept alive as long as they do.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], reach: Sequence[int]) -> None:
        self.addresses = list(map(torch.Tensor.data_ptr, tensors))
        self.reach = reach
        self.is_relative = len(tensors) == 1
        self.kept = () if self.is_relative else tuple(tensors)

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether rows that were made for this side are right for these."""
        if self.is_relative:
            (tensor,) = tensors
            return (tensor.data_ptr() ^ self.addresses[0]) % layout.VECTOR_NBYTES == 0 and span_nbytes(
                tensor
            ) >= self.reach[0]
        return list(map(torch.Tensor.data_ptr, tensors)) == self.addresses

    def base(self, tensors: Sequence[torch.Tensor]) -> int:
        """What the rows count from."""
        return tensors[0].data_ptr() if self.is_relative else 0


class Launch(NamedTuple):
    """A compiled kernel with its grid, its arguments but for the bases, and what to add to these."""

    kernel: Callable[..., None]
    rows: int | tuple[int, ...]
    tiles_address: int
    magic: tuple[int, int]
    arguments: tuple[Any, ...]
    places: tuple[int, int]


class Bound:
    """The rows of one direction of a table on a device.

    Args:
        device: where.
        every: the rows of each launch.
        variants: what kernel does each.
        tensors, buffers: where the rows point.
        programs: of a launch at most; None is one a tile.
        stream: the current one, on which the table is uploaded.
    """

    def __init__(
        self,
        device: torch.device,
        every: Sequence[Rows],
        variants: Sequence[Variant],
        tensors: Side,
        buffers: Side,
        programs: int | None,
        stream: Any,
    ) -> None:
        self.device = device
        self.tensors, self.buffers = tensors, buffers
        # One allocation and one copy for everything, each part at a multiple of a row. The allocator of pinned memory
        # does not hand the staging out again before the copy is done.
        parts: list[Any] = []
        sizes = []
        for rows in every:
            row, of_tiles, _, _ = rows.given
            some = [rows.rows.reshape(-1) if row is None else np.zeros(0, np.int32), of_tiles]
            parts += [*some, np.zeros(-len(of_tiles) % layout.ROW_INTS, np.int32)]
            sizes.append([part.nbytes for part in parts[-3:]])
        staging = torch.from_numpy(np.concatenate(parts)).pin_memory()
        self.memory = staging.to(device, non_blocking=True)
        # What streams other than this one wait for before they read the table.
        self._uploaded: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._uploaded.record(stream)
        self._ordered = {stream.cuda_stream}
        self.launches: list[Launch] = []
        self._streams: set[int] = set()
        address = self.memory.data_ptr()
        target = current_target()
        for rows, variant, (rows_nbytes, *of_tiles_nbytes) in zip(every, variants, sizes, strict=True):
            count = len(rows.tiles)
            grid = -(-count // variant.program.tiles)
            if programs is not None:
                grid = min(grid, programs)
            kernel = compiled(variant, target, device.index)[(grid, 1, 1)]
            row, _, magic, places = rows.given
            arguments = (count, *variant.constants().values())
            tiles_address = address + rows_nbytes
            self.launches.append(Launch(kernel, row or address, tiles_address, magic, arguments, places))
            address = tiles_address + sum(of_tiles_nbytes)

    def is_of(self, tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> bool:
        """Whether the rows are right for these."""
        return self.tensors.is_of(tensors) and self.buffers.is_of(buffers)

    def launch(
        self, packs: bool, tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], stream: Any
    ) -> None:
        """Start the kernels on a stream, the current one, and tell the allocator who uses the memory there."""
        # A capture may not wait for what was recorded before it began; whoever begins one has waited for the device.
        if stream.cuda_stream not in self._ordered and not torch.cuda.is_current_stream_capturing():
            stream.wait_event(self._uploaded)
            self._ordered.add(stream.cuda_stream)
        read, write = self.tensors.base(tensors), self.buffers.base(buffers)
        if not packs:
            read, write = write, read
        for kernel, rows, tiles, magic, arguments, (read_at, write_at) in self.launches:
            kernel(rows, tiles, *magic, read + read_at, write + write_at, *arguments, stream=stream.cuda_stream)
        used: list[torch.Tensor] = []
        for side, given in ((self.tensors, tensors), (self.buffers, buffers)):
            used += given if side.is_relative else ()
        if stream.cuda_stream not in self._streams:
            self._streams.add(stream.cuda_stream)
            used += [self.memory, *self.tensors.kept, *self.buffers.kept]
        for tensor in used:
            tensor.record_stream(stream)


def current_target() -> Any:
    """What Triton compiles for on the current device."""
    from triton.runtime import driver

    return driver.active.get_current_target()


def span_nbytes(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to behind its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    if not tensor.numel():
        return 0
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()
