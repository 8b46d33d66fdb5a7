"""Cells that stay whole, each copy sent by the holder that has least to do. All are looked at, so ranks are few."""

import numpy as np

from tricomm.layout.topology import Topology
from tricomm.plan.product.pieces import Cutting

FEW_DELIVERIES = 1 << 11
"""So many cells, each as often as it is sent, are allotted in some milliseconds."""


def allotted(cutting: Cutting, itemsize: int, topology: Topology) -> np.ndarray:
    """Which of its tile's holders sends each cell to each replica, largest cells first: whoever is done first with what
    it sends. Replicas that have holders on their host hear from those, and as they have less choice they come first.

    A holder is done when its NIC has sent everything that its ranks send, and when it has posted its own messages.

    Args:
        cutting: of both sides.
        itemsize: bytes of an element on the wire.
        topology: of all ranks.

    Returns:
        (cells of each dim, replicas), numbers of holders; 0 where nothing is sent.
    """
    rows, hosts = cutting.every, topology.host_numbers
    found = np.zeros((*map(len, cutting.lengths), cutting.destination.replicas), np.int64)
    sizes, (sources, tiles) = cutting.numel(rows) * itemsize, cutting.tiles_of(rows)
    nic_seconds = np.zeros(len(topology.nic_send_rates))
    posted = np.zeros(len(topology.hosts), np.int64)
    order = np.argsort(-sizes, kind="stable").tolist()
    for is_beside in (True, False):
        for row in order:
            every, needing = cutting.source.ranks[sources[row]], cutting.destination.ranks[tiles[row]]
            here = hosts[every] == hosts[needing][:, None]
            for copy in np.flatnonzero((here.any(1) == is_beside) & ~np.isin(needing, every)).tolist():
                places = np.flatnonzero(here[copy]) if is_beside else np.arange(len(every))
                holders = every[places]
                nics = topology.nic_numbers[holders]
                seconds = np.zeros(len(nics)) if is_beside else sizes[row] / topology.nic_send_rates[nics]
                sending, posting = nic_seconds[nics] + seconds, (posted[holders] + 1) * topology.overhead_seconds
                best = np.lexsort((places, sending + posting, np.maximum(sending, posting)))[0]
                found[(*rows[row], copy)] = places[best]
                nic_seconds[nics[best]] += seconds[best]
                posted[holders[best]] += 1
    return found
