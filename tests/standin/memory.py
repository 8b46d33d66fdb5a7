"""Memory of devices that ranks share, and words that streams write and wait for.

Rules, beside those of devices and NCCL:
15. A stream that waits for a word is held, and counts as something that runs: a kernel that is new, and whoever takes
    memory away, wait for it on the host.
16. Whatever the host or a device writes to a word, streams that wait for it see.
17. What one rank exports, others open; a rank cannot open its own. Memory that is freed while another has it open, and
    what is used after it was closed, is a fault of the library, which ``Exports`` tells.
18. A page is registered until it is given back, also when it is not mapped any more: what is mapped there next is
    refused.
"""

import ctypes
import struct
from typing import Any

import torch

from tests.standin.device import Command, Device, Stream
from tricomm.transport.device.memory import DeviceMemoryError, Segment

HANDLE = struct.Struct("=IIQ48x")
SEGMENT_NBYTES = 1 << 16
FRESH, GONE = 0xAA, 0xDD
"""What stands in memory that nobody has written, and in what was freed."""


class Exports:
    """What all ranks have allocated, and who has it open."""

    def __init__(self) -> None:
        self.memory: dict[int, torch.Tensor] = {}
        self.opened: list[tuple[int, int]] = []
        """(rank, address)."""
        self.faults: list[str] = []
        self.refused: dict[int, str] = {}
        """Ranks whose driver opens nothing, and what it says."""
        self.private: dict[int, str] = {}
        """Ranks whose allocator has memory that no other process can open, and what the driver says."""
        self.identities: dict[int, str] = {}
        """Devices of ranks; those that do not stand here share one."""


class WriteWord(Command):
    """A stream writes a word."""

    def __init__(self, stream: Stream, address: int, value: int) -> None:
        super().__init__(stream)
        self.address, self.value = address, value

    def leave(self) -> None:
        ctypes.c_uint32.from_address(self.address).value = self.value
        self.done = True
        self.stream.device.world.has_changed = True


class WaitWord(Command):
    """A stream waits for a word."""

    def __init__(self, stream: Stream, address: int, value: int) -> None:
        super().__init__(stream)
        self.address, self.value = address, value

    def is_ready(self) -> bool:
        if not self.is_next:
            return False
        has_come = (ctypes.c_uint32.from_address(self.address).value - self.value) % (1 << 32) < 1 << 31
        holding = self.stream.device.holding
        (holding.discard if has_come else holding.add)(self)
        return has_come


class StandInMemory:
    """See DeviceMemory: that of one rank.

    Args:
        device: of the rank.
        rank: whose.
        exports: of all ranks.
    """

    def __init__(self, device: Device, rank: int, exports: Exports) -> None:
        self.device, self.rank, self.exports = device, rank, exports
        self.registered: set[int] = set()

    def identity(self) -> str:
        return self.exports.identities.get(self.rank, "one")

    def refusal(self, other: str) -> str:
        return "" if other == self.identity() else "no NVLink joins the two GPUs"

    def allocate(self, nbytes: int) -> int:
        memory = torch.full((nbytes,), FRESH, dtype=torch.uint8)
        with self.device.world.moved:
            self.exports.memory[memory.data_ptr()] = memory
        return memory.data_ptr()

    def _wait_idle(self) -> None:
        if self.device.limits.loads:
            self.device.answer()
            self.device.wait_idle()

    def free(self, address: int) -> None:
        with self.device.world.moved:
            self._wait_idle()
            if any(one == address for _, one in self.exports.opened):
                self.exports.faults.append(f"rank {self.rank} freed what another has open")
            self.exports.memory.pop(address).fill_(GONE)

    def exported(self, address: int) -> bytes:
        return HANDLE.pack(self.rank, 0, address)

    def segment(self, address: int) -> Segment:
        """Pieces of the host's memory stand for what an allocator has from the driver; they overlap here."""
        if self.rank in self.exports.private:
            raise DeviceMemoryError(self.exports.private[self.rank])
        base = address // SEGMENT_NBYTES * SEGMENT_NBYTES
        return Segment(self.exported(base), base // SEGMENT_NBYTES, base, 1 << 40)

    def opened(self, handle: bytes) -> int:
        owner, _, address = HANDLE.unpack(handle)
        if owner == self.rank or self.rank in self.exports.refused:
            raise DeviceMemoryError(self.exports.refused.get(self.rank, "CUDA_ERROR_INVALID_CONTEXT (201)"))
        with self.device.world.moved:
            self.exports.opened.append((self.rank, address))
        return int(address)

    def close(self, address: int) -> None:
        with self.device.world.moved:
            self._wait_idle()
            self.exports.opened.remove((self.rank, address))

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)

    def register(self, address: int, nbytes: int) -> int:
        if address in self.registered:
            raise DeviceMemoryError("CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED (712)")
        self.registered.add(address)
        return address

    def unregister(self, address: int) -> None:
        with self.device.world.moved:
            self._wait_idle()
            self.registered.remove(address)

    def wait_value(self, stream: Any, address: int, value: int) -> None:
        with self.device.world.moved:
            self.device.answer()
            stream.push(WaitWord(stream, address, value))

    def write_value(self, stream: Any, address: int, value: int) -> None:
        with self.device.world.moved:
            self.device.answer()
            stream.push(WriteWord(stream, address, value))

    def stored(self) -> None:
        with self.device.world.moved:
            self.device.world.pump()
