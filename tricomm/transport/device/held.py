"""Held: what connections over device memory leave behind, and give back when nobody uses it any more."""

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from tricomm.transport.device.link import DeviceLink
from tricomm.transport.device.memory import DeviceMemory
from tricomm.transport.device.run import DeviceRuns

LOG = logging.getLogger("tricomm")

BLOCK_NBYTES = 2 << 20
"""What the driver allocates at once: less of it would share a handle with something else."""

PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 1.0
"""Between two looks whether the device is idle, and whether peers have given back what they had open."""


class Held:
    """See above.

    Args:
        memory, device: of this rank.
        runs: of the communicator.
        links: of it.
        blocks: addresses of what this rank has allocated; some may be added.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        device: torch.device,
        runs: DeviceRuns,
        links: tuple[DeviceLink, ...],
        blocks: list[int],
    ) -> None:
        self._memory = memory
        self.device = device
        self.runs = runs
        self._links = links
        self.blocks = blocks

    def give_back(self, are_idle: Callable[[], bool]) -> None:
        """Close what was opened, say so, and free what peers have closed; waits for them. What a driver refuses holds
        up nothing else.
        """
        _await(are_idle, PAUSE_SECONDS)
        for link in self._links:
            self._try(link.unmap)
            link.signals.close()
        _await(lambda: all(link.is_unmapped() for link in self._links), LONGEST_PAUSE_SECONDS)
        _await(are_idle, PAUSE_SECONDS)
        for link in self._links:
            self._try(link.flags.close)
        while self.blocks:
            self._try(partial(self._memory.free, self.blocks.pop()))

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except RuntimeError as error:
            LOG.warning("while memory of %s was given back: %s", self.device, error)


def _await(is_so: Callable[[], bool], longest_seconds: float) -> None:
    pause = PAUSE_SECONDS
    while not is_so():
        time.sleep(pause)
        pause = min(1.5 * pause, longest_seconds)
