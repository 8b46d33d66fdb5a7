"""Cells that stay whole, each copy sent by the holder that has least to do. All are looked at, so ranks are few."""

import numpy as np

from tricomm.layout.topology import Topology
from tricomm.plan.product.pieces import Cutting

FEW_DELIVERIES = 1 << 11
"""So many cells, each as often as it is sent, are allotted in some milliseconds."""


def allotted(cutting: Cutting, itemsize: int, topology: Topology) -> np.ndarray:
    """Which of its tile's holders sends each cell to each replica, largest cells first: whoever is done first with what
    it sends. Replicas that have a holder on their host hear from there.

    A holder is done when its NIC has sent everything that its ranks send, and when it has posted its own messages.

    Args:
        cutting: of both sides.
        itemsize: bytes of an element on the wire.
        topology: of all ranks.

    Returns:
        (cells of each dim, replicas), numbers of holders; 0 where nothing leaves a host.
    """
    rows = cutting.every
    found = np.zeros((*map(len, cutting.lengths), cutting.destination.replicas), np.int64)
    sizes, (sources, tiles) = cutting.numel(rows) * itemsize, cutting.tiles_of(rows)
    nic_seconds = np.zeros(len(topology.nic_send_rates))
    posted = np.zeros(len(topology.hosts), np.int64)
    places = np.arange(cutting.source.replicas)
    for row in np.argsort(-sizes, kind="stable").tolist():
        holders = cutting.source.ranks[sources[row]]
        nics = topology.nic_numbers[holders]
        seconds = sizes[row] / topology.nic_send_rates[nics]
        needing = topology.host_numbers[cutting.destination.ranks[tiles[row]]]
        for copy in np.flatnonzero(~np.isin(needing, topology.host_numbers[holders])).tolist():
            sending, posting = nic_seconds[nics] + seconds, (posted[holders] + 1) * topology.overhead_seconds
            best = np.lexsort((places, sending + posting, np.maximum(sending, posting)))[0]
            found[(*rows[row], copy)] = best
            nic_seconds[nics[best]] += seconds[best]
            posted[holders[best]] += 1
    return found
