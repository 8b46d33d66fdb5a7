"""Held: what connections over device memory leave behind, and give back when nobody uses it any more."""

import logging
from collections.abc import Callable
from functools import partial

import torch

from tricomm.transport.coordination.background import wait_until
from tricomm.transport.device.alive import when_idle
from tricomm.transport.device.link import DeviceLink
from tricomm.transport.device.memory import DeviceMemory
from tricomm.transport.device.run import DeviceRuns
from tricomm.transport.device.shares import Shares

LOG = logging.getLogger("tricomm")

BLOCK_NBYTES = 2 << 20
"""What the driver allocates at once: less of it would share a handle with something else."""


class Held:
    """See above.

    Args:
        memory, device: of this rank.
        runs: of the communicator.
        links: of it.
        blocks: addresses of what this rank has allocated; some may be added.
        shares: tensors that were shared.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        device: torch.device,
        runs: DeviceRuns,
        links: tuple[DeviceLink, ...],
        blocks: list[int],
        shares: Shares,
    ) -> None:
        self._memory = memory
        self.device = device
        self.runs = runs
        self._links = links
        self.blocks = blocks
        self.shares = shares

    def give_back(self, are_idle: Callable[[], bool]) -> None:
        """Close what was opened, say so, and free what peers have closed; waits for them. What a driver refuses holds
        up nothing else.
        """
        when_idle(are_idle, self._unmap)
        wait_until(lambda: all(link.is_unmapped() for link in self._links))
        self.shares.forget()
        when_idle(are_idle, self._free)

    def _unmap(self) -> None:
        self._try(self.shares.unmap)
        for link in self._links:
            self._try(link.unmap)
            link.signals.close()

    def _free(self) -> None:
        for link in self._links:
            self._try(link.flags.close)
        while self.blocks:
            self._try(partial(self._memory.free, self.blocks.pop()))

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except RuntimeError as error:
            LOG.warning("while memory of %s was given back: %s", self.device, error)
