"""Joining: the connections of ranks whose tensors are on devices: by memory, and NCCL where a pair needs it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tricomm.transport.accelerator import Accelerator
from tricomm.transport.base import Connections
from tricomm.transport.device.connections import DeviceConnections, give_back_later
from tricomm.transport.device.meeting import Meeting, Notices
from tricomm.transport.device.run import DeviceRuns
from tricomm.transport.memory.meeting import Doorway


def joined(
    accelerator: Accelerator,
    device: torch.device,
    store: Any,
    ranks: tuple[int, Sequence[int]],
    door: Doorway | None,
    needs_network: bool,
    connect: Callable[[DeviceRuns], Connections],
    interrupted: Callable[[], None],
) -> DeviceConnections:
    """Connections between ranks on devices, once all have come.

    NCCL is connected only if a pair of any rank has no memory in common, or somebody needs it anyway: it takes memory
    and streams, and refuses two ranks on one device.

    Args:
        accelerator, device: of this rank.
        store: of these connections alone.
        ranks: this one, and all.
        door: where the ranks of this host come to link their memory; None if this rank has none.
        needs_network: whether a Resharder is to use the network alone.
        connect: gives connections over NCCL.
        interrupted: raises if the connecting is to end.
    """
    rank, participants = ranks
    memory, runs = accelerator.memory(device), DeviceRuns(accelerator, device)
    notices = Notices(store, rank, participants, interrupted)
    meeting = Meeting(accelerator, memory, device, door)
    try:
        links, transports = meeting.links(notices, interrupted)
        needs_network |= len(links) < len(participants) - 1
        network = connect(runs) if notices.any_of_all(needs_network) else None
        is_mixed = notices.any_of_all(bool(links))
    except BaseException:
        give_back_later(meeting.held(runs))
        raise
    finally:
        if door is not None:
            door.close()
    notices.close()
    return DeviceConnections(accelerator, memory, network, links, transports, meeting.held(runs), is_mixed, interrupted)
