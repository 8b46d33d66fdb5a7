"""Transports: LocalTransport runs all ranks in one process and is the specification of the real ones."""

from tricomm.transport.local import LocalTransport

__all__ = ["LocalTransport"]
