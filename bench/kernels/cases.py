"""The geometries of the kernel benchmark: weights, activations and caches of real models, and the awkward ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tricomm.kernels.boxes import Boxes, boxes_in_order


class Part(NamedTuple):
    """Boxes of one shape: ``starts`` in tensor ``tensor``."""

    tensor: int
    starts: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A geometry.

    Attributes:
        name: as it is printed.
        tensors: makes the tensors on a device, divided by a scale so that a machine without a GPU can hold them.
        parts: the boxes, for tensors of that scale.
        packed: element type of the buffer where elements are cast.
    """

    name: str
    tensors: Callable[[torch.device, int], list[torch.Tensor]]
    parts: Callable[[Sequence[torch.Tensor]], list[Part]]
    packed: torch.dtype | None = None

    def boxes(self, tensors: Sequence[torch.Tensor]) -> tuple[Boxes, int]:
        """The boxes of these tensors, and the bytes of the buffer."""
        rank = max(max(tensor.ndim, 1) for tensor in tensors)
        which: list[int] = []
        starts: list[tuple[int, ...]] = []
        shapes: list[tuple[int, ...]] = []
        for part in self.parts(tensors):
            lead = rank - len(part.shape)
            which += [part.tensor] * len(part.starts)
            starts += [(0,) * lead + start for start in part.starts]
            shapes += [(1,) * lead + part.shape] * len(part.starts)
        start, shape = (np.array(column, np.int64).reshape(len(which), rank) for column in (starts, shapes))
        return boxes_in_order(tensors, np.array(which, np.int64), start, shape, self.packed)


def _made(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, turned: bool = False
) -> Callable[..., list[torch.Tensor]]:
    """Tensors of these shapes, the first dim of each divided by the scale."""

    def make(device: torch.device, scale: int) -> list[torch.Tensor]:
        found = []
        for first, *rest in shapes:
            # Drawn where they are wanted: a processor takes a minute for all geometries.
            tensor = torch.empty((max(first // scale, 1), *rest), dtype=dtype, device=device)
            tensor.view(torch.uint8).random_(0, 64)
            found.append(tensor.T if turned else tensor)
        return found

    return make


def _share(dim: int, ways: int, index: int = 1) -> Callable[[Sequence[torch.Tensor]], list[Part]]:
    """One of ``ways`` even parts of a dim of every tensor."""

    def parts(tensors: Sequence[torch.Tensor]) -> list[Part]:
        found = []
        for number, tensor in enumerate(tensors):
            shape, start = list(tensor.shape), [0] * tensor.ndim
            shape[dim] //= ways
            start[dim] = index * shape[dim]
            found.append(Part(number, (tuple(start),), tuple(shape)))
        return found

    return parts


def _cut(ways: tuple[int, ...]) -> Callable[[Sequence[torch.Tensor]], list[Part]]:
    """All of every tensor, in even parts along each dim."""

    def parts(tensors: Sequence[torch.Tensor]) -> list[Part]:
        found = []
        for number, tensor in enumerate(tensors):
            shape = tuple(max(n // way, 1) for n, way in zip(tensor.shape, ways, strict=True))
            places = np.indices([n // m for n, m in zip(tensor.shape, shape, strict=True)]).reshape(tensor.ndim, -1).T
            found.append(Part(number, tuple(map(tuple, (places * shape).tolist())), shape))
        return found

    return parts


def _inner(start: tuple[int, ...], less: tuple[int, ...]) -> Callable[[Sequence[torch.Tensor]], list[Part]]:
    """Every tensor without its edges."""

    def parts(tensors: Sequence[torch.Tensor]) -> list[Part]:
        return [
            Part(index, (start,), tuple(n - m for n, m in zip(tensor.shape, less, strict=True)))
            for index, tensor in enumerate(tensors)
        ]

    return parts


FP8 = torch.float8_e4m3fn
HALF = torch.bfloat16
CASES = (
    Case("flat 256 MB", _made((128, 2**20)), _share(0, 1, 0)),
    Case("Llama-3-70B w1, rows 1/8", _made((28672, 8192)), _share(0, 8)),
    Case("Llama-3-70B w2, columns 1/8", _made((8192, 28672)), _share(1, 8)),
    Case("Llama-3-70B w2, columns 1/64", _made((8192, 28672)), _share(1, 64)),
    *(
        Case(f"run of {nbytes} B", _made((2**26 // nbytes, nbytes)), _share(1, 2))
        for nbytes in (4096, 2048, 512, 256, 128, 64, 32, 16, 8, 4, 2)
    ),
    Case("GPT-3 hidden 1/8", _made((2048, 1, 12288)), _share(2, 8)),
    Case("GPT-3 sequence 1/8", _made((2048, 1, 12288)), _share(0, 8)),
    Case("(s, b, h) to batches", _made((2048, 4, 12288)), _cut((1, 4, 1))),
    Case("GPT-3 fused QKV planes", _made((96, 3, 128, 12288)), _share(1, 3)),
    Case("Llama-3-70B grouped QKV", _made((8, 10 * 128, 8192)), _inner((0, 1024, 0), (0, 1152, 0))),
    Case("KV cache NHD, one head", _made((8192, 16, 8, 128)), _share(2, 8)),
    Case("KV cache NHD fp8, one head", _made((8192, 16, 8, 128), dtype=FP8), _share(2, 8)),
    Case("KV cache HND, one head", _made((8192, 8, 16, 128)), _share(1, 8)),
    Case("MLA cache, 1152 B rows", _made((8192, 64, 640)), _inner((0, 0, 0), (0, 0, 64))),
    Case("80 layers of K and V", _made(*[(512, 16, 8, 128)] * 160), _share(2, 8)),
    Case("DeepSeek-V3 experts fp8, columns 1/8", _made((16, 4096, 7168), dtype=FP8), _share(2, 8)),
    Case("DeepSeek-V3 scales, 28 B rows", _made((256, 32, 56), dtype=torch.float32), _share(2, 8)),
    Case("Mixtral experts, rows 1/8", _made((8, 14336, 4096)), _share(1, 8)),
    Case("gpt-oss, 5760 B rows", _made((8192, 2880)), _cut((8, 1))),
    Case("gpt-oss scales, 90 B rows", _made((65536, 180), dtype=torch.uint8), _share(1, 2)),
    Case("vocabulary 50257, columns", _made((12288, 50257)), _share(1, 7)),
    Case("from the second element on", _made((4096, 8192)), _inner((0, 1), (0, 1))),
    Case("odd extents, 5 dims", _made((63, 65, 67, 9, 57)), _inner((0, 1, 1, 1, 1), (0, 2, 2, 2, 2))),
    Case("160 norms", _made(*[(8192,)] * 160), _share(0, 2)),
    Case("10,000 x 1 KB", _made((10000, 1024)), _cut((10000, 2))),
    Case("LoRA", _made(*[(16, 8192), (8192, 16)] * 64), _share(1, 2)),
    Case("Llama-3-8B, TP 2 to 4", _made(*[(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)] * 8), _cut((2, 2))),
    Case("45,000 boxes", _made((45000, 64, 64)), _cut((45000, 1, 2))),
    Case("convolution, input channels", _made((1280, 1280, 3, 3)), _share(1, 8)),
    Case("(B, H, S, D) head and sequence", _made((8, 32, 4096, 128)), _cut((1, 4, 4, 1))),
    Case("float32 to bfloat16", _made((8192, 16384), dtype=torch.float32), _share(1, 2), HALF),
    Case("bfloat16 to float32", _made((8192, 16384)), _share(1, 2), torch.float32),
    Case("bfloat16 to float8_e4m3fn", _made((8192, 16384)), _share(1, 2), FP8),
    Case("transposed bfloat16", _made((8192, 8192), turned=True), _share(0, 2)),
    Case("transposed float8", _made((8192, 16384), dtype=FP8, turned=True), _share(0, 2)),
    Case("transposed float32", _made((8192, 8192), dtype=torch.float32, turned=True), _share(0, 2)),
)
