"""What one process keeps to coordinate with the other ranks of one process group."""

from typing import Any

import torch.distributed as dist

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
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._base_store = group.get_group_store()  # one that is written in Python goes with its last reference here
        self.store = dist.PrefixStore("tricomm", self._base_store)
        self.status = StatusStore(self.store, self.rank)
        self.monitor = Monitor(self.status)
        self.dead: dict[int, str] = {}
        """Ranks whose connections closed without a word, and how that was found; until they come again."""
        self.rendezvous = Rendezvous(self.store, self.rank, self.monitor, self.dead)
