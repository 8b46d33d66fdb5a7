"""What one process keeps to coordinate with the other ranks of one process group."""

import os
from typing import Any

import torch.distributed as dist

from tricomm.errors import TransportError
from tricomm.transport.coordination.monitor import Monitor
from tricomm.transport.coordination.rendezvous import Rendezvous
from tricomm.transport.coordination.status import StatusStore


class Coordinator:
    """This rank's status, monitor and rendezvous in one process group, which is not kept alive.

    Args:
        group: a ProcessGroup of torch, whose own ranks count.

    Raises:
        SpecError: a group without a store.
    """

    def __init__(self, group: Any) -> None:
        self.process = os.getpid()
        """That which first used the process group."""
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._base_store = group.get_group_store()  # one that is written in Python goes with its last reference here
        self.store = dist.PrefixStore("tricomm", self._base_store)
        self.status = StatusStore(self.store, self.rank)
        self.monitor = Monitor(self.status)
        self.dead: dict[int, str] = {}
        """Ranks whose connections closed without a word, and how that was found; until they come again."""
        self.rendezvous = Rendezvous(self.store, self.rank, self.monitor, self.dead)

    def require_own_process(self) -> None:
        """Refuse a forked child, which would take and answer what is meant for its parent.

        Raises:
            TransportError: this is another process than the one that first used the process group.
        """
        if os.getpid() != self.process:
            raise TransportError(
                f"process {os.getpid()} is a fork of process {self.process}, whose connections it would share; call "
                "in the process that made the process group, or spawn one that makes its own"
            )
