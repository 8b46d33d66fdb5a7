"""What a process says of itself at a meeting: what must be equal on all ranks, and where it runs."""

import ctypes
import os
import platform
import sys
import uuid
from functools import cache
from pathlib import Path

import torch

from tricomm.connect.meeting.join import Join
from tricomm.connect.version import __version__

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def facts_of(device: torch.device) -> tuple[tuple[str, str], ...]:
    """Return what must be equal on all ranks, as (what, value)."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    found = [
        ("tricomm", __version__),
        ("torch", str(torch.__version__)),
        ("backend", backend),
        ("device", device.type),
        ("byte order", sys.byteorder),
    ]
    if backend == "nccl":
        found += [("NCCL (that torch was built with)", _built_with()), ("NCCL (that runs)", _running())]
    return tuple(found)


def join_of(
    sides: tuple[tuple[str, int], ...], side: str, rank: int, device: torch.device, host: str | None, name: str
) -> Join:
    """Return what this process says when it comes.

    Args:
        sides, side, rank, name: see Join.
        device: of the tensors.
        host: what this machine is called; None is its own name.
    """
    return Join(
        sides,
        side,
        rank,
        host=host or platform.node(),
        pid=os.getpid(),
        machine=host or _machine(),
        gpu=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "",
        facts=facts_of(device),
        name=name,
    )


@cache
def _machine() -> str:
    """Return what no other running machine has."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"


def _built_with() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _running() -> str:
    """Return the version of the library that is loaded, which an image may have exchanged."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return "unknown"
    return str(number.value)
