"""DeviceMemory: what a driver does for memory that processes of one host share; a stand-in does the same in tests."""

from typing import Any, NamedTuple, Protocol

import torch


class DeviceMemoryError(RuntimeError):
    """The driver refused. The text says what, in its words."""


class Segment(NamedTuple):
    """An allocation in which tensors lie.

    Attributes:
        handle: what another process opens it by.
        number: of all allocations of this process, as addresses recur.
        address, nbytes: all of it.
    """

    handle: bytes
    number: int
    address: int
    nbytes: int

    def has(self, address: int, nbytes: int) -> bool:
        """Whether all of that is in it."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


class DeviceMemory(Protocol):
    """That of one device, in this process. Every method may raise DeviceMemoryError."""

    def identity(self) -> str:
        """The device's, the same in every process."""
        ...

    def refusal(self, other: str) -> str:
        """Why kernels here should not read the memory of another device, by its identity; "" if they may."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory that can be exported."""
        ...

    def free(self, address: int) -> None:
        """Give memory back that nobody has open any more; may wait for all that the device has to do."""
        ...

    def exported(self, address: int) -> bytes:
        """Return what another process opens allocated memory by."""
        ...

    def segment(self, address: int) -> Segment:
        """Return the allocation in which an address lies, whoever made it."""
        ...

    def opened(self, handle: bytes) -> int:
        """Return the address here of what another process has exported."""
        ...

    def close(self, address: int) -> None:
        """Give back what was opened; may wait for all that the device has to do."""
        ...

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """uint8, of memory that it does not keep."""
        ...

    def register(self, address: int, nbytes: int) -> int:
        """Let the device read and write whole pages of the host; returns their address there."""
        ...

    def unregister(self, address: int) -> None:
        """Give them back."""
        ...

    def wait_value(self, stream: Any, address: int, value: int) -> None:
        """Let a stream go on once the word of 4 bytes at a device address is ``value`` or up to 2**31 - 1 more."""
        ...

    def write_value(self, stream: Any, address: int, value: int) -> None:
        """Let a stream write a word, after all that it was given before."""
        ...

    def stored(self) -> None:
        """The host has written a registered word."""
        ...
