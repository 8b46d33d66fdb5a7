"""Messages of which each enters at the replicas that have heard least. All are looked at, so ranks are few."""

import numpy as np

from tricomm.layout.topology import Topology
from tricomm.plan.product.grid import Rings
from tricomm.plan.product.rings import Visits

MOST_TURNS = 64
"""Of hosts with unequally many replicas, of which all would take longer to try."""


def least_heard(visits: Visits, rings: Rings, topology: Topology) -> Visits:
    """Let messages enter, the largest first, at replicas by whose NICs least was heard until then, and first on the
    host where least did.

    Args:
        visits: that go round all hosts of their tiles.
        rings: of the tiles.
        topology: of all ranks.
    """
    heard, first = np.zeros(len(topology.nic_receive_rates)), np.zeros(len(topology.hosts))
    offsets, turns, nbytes = visits.offsets.copy(), visits.turns.copy(), visits.regions.numel
    choices = np.arange(min(rings.round, MOST_TURNS))
    for row in np.argsort(-nbytes, kind="stable").tolist():
        tile = int(visits.tiles[row])
        hosts = rings.host_numbers[tile, : rings.hosts[tile]]
        firsts = rings.firsts[tile, : len(hosts) + 1]
        at = firsts[:-1] + choices[:, None] % np.diff(firsts)
        nics = topology.nic_numbers[rings.ranks[tile, at]]
        loads = heard[nics]
        turn = int(np.lexsort((choices, loads.sum(1), loads.max(1)))[0])
        place = int(first[hosts].argmin())
        np.add.at(heard, nics[turn], nbytes[row])
        first[hosts[place]] += nbytes[row]
        offsets[row], turns[row] = place, turn
    return visits._replace(offsets=offsets, turns=turns)
