"""The kernels in Triton's interpreter, on host memory, beside the compiled ones of the same process."""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime.interpreter import TensorHandle

from tricomm.kernels import layout
from tricomm.kernels.pack import Table


@cache
def interpreted() -> ModuleType:
    """A second copy of ``tricomm.kernels.jit``, and of what it imports: whether a function is interpreted is decided
    when it is decorated.
    """
    with knobs.runtime.scope(), patch.dict(sys.modules):
        knobs.runtime.interpret = True
        for name in ("jit_table", "jit_casts", "jit_shifted", "jit"):
            spec = importlib.util.spec_from_file_location(
                f"tricomm.kernels.{name}", Path(layout.__file__).with_name(f"{name}.py")
            )
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
    return module


def int64(number: int) -> tl.tensor:
    """An address as binaries take it: in 8 bytes, of which alone the interpreter makes pointers.

    Of a plain number that fits it makes 4. Addresses do where the heap lies low, as in Debian's python3, which is not
    position-independent.
    """
    return tl.tensor(TensorHandle(np.array([number], np.int64), tl.int64), tl.int64)


def launch(
    table: Table,
    packs: bool,
    tensors: Sequence[torch.Tensor],
    buffers: Sequence[torch.Tensor],
    words_per_tile: int | None = None,
) -> int:
    """What ``Table.launch`` does on a device; returns how many kernels it took."""
    table.check(tensors, buffers)
    of_tensors, of_buffers = ([side.data_ptr() for side in sides] for sides in (tensors, buffers))
    every = table.rows(packs, of_tensors, of_buffers, words_per_tile)
    bases = [addresses[0] if len(addresses) == 1 else 0 for addresses in (of_tensors, of_buffers)]
    for rows in every:
        variant = table.variant(rows, packs)
        constants = variant.constants()
        count = len(rows.tiles)
        grid = -(-count // variant.program.tiles)
        if table.multiprocessors is not None:
            grid = min(grid, table.multiprocessors)
        row, of_tiles, magic, places = rows.given
        arrays = row or torch.from_numpy(rows.rows), torch.from_numpy(of_tiles)
        both = [int64(base + place) for base, place in zip(bases if packs else bases[::-1], places, strict=True)]
        with warnings.catch_warnings():
            # numpy warns of what is infinite or NaN by intention.
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel = variant.kernel(interpreted())
            kernel[(grid,)](*arrays, *magic, *both, count, *constants.values())
    return len(every)
