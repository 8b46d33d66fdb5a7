"""CUDA's driver as a DeviceMemory: own memory, its handles, registered pages, and stream memory operations, by ctypes.

Memory comes from the driver and not from torch's allocator, whose segments go and come, may have no handle at all
(expandable segments), and are handed out to one consumer each. Streams wait for a word of host memory without a
multiprocessor.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tricomm.transport.device.memory import DeviceMemoryError, Segment

HANDLE_NBYTES = 64
WAITS_UNTIL_AT_LEAST = 0
WRITES_AFTER_ALL = 0
PORTABLE_AND_MAPPED = 3
ENABLES_PEER_ACCESS = 1
NUMBER_OF_ALLOCATION = 7
LINKS_WITH_ATOMICS = 3
"""The attribute of a pair of devices that NVLink has and PCIe has not."""


class Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_NBYTES),)


Word, Address, Size, Pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuMemAlloc_v2": (ctypes.POINTER(Address), Size),
    "cuMemFree_v2": (Address,),
    "cuMemGetAddressRange_v2": (ctypes.POINTER(Address), ctypes.POINTER(Size), Address),
    "cuPointerGetAttribute": (Pointer, ctypes.c_int, Address),
    "cuIpcGetMemHandle": (ctypes.POINTER(Handle), Address),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(Address), Handle, Word),
    "cuIpcCloseMemHandle": (Address,),
    "cuMemHostRegister_v2": (Pointer, Size, Word),
    "cuMemHostUnregister": (Pointer,),
    "cuMemHostGetDevicePointer_v2": (ctypes.POINTER(Address), Pointer, Word),
    "cuStreamWaitValue32_v2": (Pointer, Address, Word, Word),
    "cuStreamWriteValue32_v2": (Pointer, Address, Word, Word),
    "cuCtxGetCurrent": (ctypes.POINTER(Pointer),),
    "cuCtxSetCurrent": (Pointer,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(Pointer), ctypes.c_int),
    "cuDeviceGetP2PAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int, ctypes.c_int),
}


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceMemoryError(f"there is no CUDA driver to ask: {error}") from None


@cache
def _function(name: str) -> Callable[..., int]:
    function: Any = getattr(_library(), name, None)
    if function is None:
        raise DeviceMemoryError(f"this CUDA driver has no {name}")
    function.argtypes = ARGUMENTS[name]
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def _called(name: str, *arguments: Any) -> None:
    code = _function(name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(code, ctypes.byref(text))
        raise DeviceMemoryError(f"{name}: {(text.value or b'error').decode()} ({code})")


@cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """The context of a device that torch uses too, kept for as long as the process lives."""
    device, found = ctypes.c_int(), Pointer()
    _called("cuDeviceGet", ctypes.byref(device), index)
    _called("cuDevicePrimaryCtxRetain", ctypes.byref(found), device)
    return found


def _require_context(index: int) -> None:
    """Give this thread the device's context if it has none, which the driver refuses. torch's calls see to it by
    themselves, but to choose a device that is chosen already is none of these.
    """
    current = Pointer()
    _called("cuCtxGetCurrent", ctypes.byref(current))
    if not current.value:
        _called("cuCtxSetCurrent", _primary_context(index))


class CudaMemory:
    """See DeviceMemory.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        assert device.index is not None
        self._device = device

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self._device):
            _require_context(self._device.index)
            _called(name, *arguments)

    def identity(self) -> str:
        """See DeviceMemory."""
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def refusal(self, other: str) -> str:
        """See DeviceMemory."""
        if other == self.identity():
            return ""
        every = {str(torch.cuda.get_device_properties(n).uuid): n for n in range(torch.cuda.device_count())}
        if other not in every:
            return "its GPU is hidden from this process"
        found = ctypes.c_int()
        here, there = self._device.index, every[other]
        self._call("cuDeviceGetP2PAttribute", ctypes.byref(found), LINKS_WITH_ATOMICS, here, there)
        return "" if found.value else "no NVLink joins the two GPUs"

    def allocate(self, nbytes: int) -> int:
        """See DeviceMemory."""
        found = Address()
        self._call("cuMemAlloc_v2", ctypes.byref(found), nbytes)
        return found.value

    def free(self, address: int) -> None:
        """See DeviceMemory."""
        self._call("cuMemFree_v2", address)

    def exported(self, address: int) -> bytes:
        """See DeviceMemory."""
        found = Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(found), address)
        return ctypes.string_at(ctypes.addressof(found), HANDLE_NBYTES)

    def segment(self, address: int) -> Segment:
        """See DeviceMemory."""
        base, nbytes, number = Address(), Size(), ctypes.c_uint64()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(nbytes), address)
        self._call("cuPointerGetAttribute", ctypes.byref(number), NUMBER_OF_ALLOCATION, address)
        return Segment(self.exported(base.value), number.value % (1 << 63), base.value, nbytes.value)

    def opened(self, handle: bytes) -> int:
        """See DeviceMemory."""
        found = Address()
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(found), Handle.from_buffer_copy(handle), ENABLES_PEER_ACCESS)
        return found.value

    def close(self, address: int) -> None:
        """See DeviceMemory."""
        self._call("cuIpcCloseMemHandle", address)

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """See DeviceMemory."""
        storage = torch._C._construct_storage_from_data_pointer(address, self._device, nbytes)
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage, 0, (nbytes,), (1,))

    def register(self, address: int, nbytes: int) -> int:
        """See DeviceMemory."""
        self._call("cuMemHostRegister_v2", address, nbytes, PORTABLE_AND_MAPPED)
        found = Address()
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(found), address, 0)
        return found.value

    def unregister(self, address: int) -> None:
        """See DeviceMemory."""
        self._call("cuMemHostUnregister", address)

    def wait_value(self, stream: Any, address: int, value: int) -> None:
        """See DeviceMemory."""
        self._call("cuStreamWaitValue32_v2", stream.cuda_stream, address, value, WAITS_UNTIL_AT_LEAST)

    def write_value(self, stream: Any, address: int, value: int) -> None:
        """See DeviceMemory."""
        self._call("cuStreamWriteValue32_v2", stream.cuda_stream, address, value, WRITES_AFTER_ALL)

    def stored(self) -> None:
        """See DeviceMemory. The device sees it by itself."""
