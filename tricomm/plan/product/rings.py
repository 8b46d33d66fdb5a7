"""Chains round the replicas of a tile, as columns, and the rounds of their hops."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tricomm.layout.columns import Groups, offsets_of
from tricomm.layout.topology import Topology
from tricomm.plan.network.links import ChainLinks
from tricomm.plan.product.grid import Rings
from tricomm.plan.product.pieces import Pieces
from tricomm.plan.routes.chunks import MAX_PEERS_PER_ROUND, Chunks, MessageTable, even_chunks
from tricomm.plan.routes.rounds import Hops, order_of_hops

STEP_STRIDE = 1 << 32
WITHIN_HOST_STRIDE = 1 << 16
"""Round numbers of one step, and of one hop within a host; what is below tells apart rounds of one step that would
otherwise have too many messages."""


class RingMessages(MessageTable):
    """Messages that each go once round the replicas of a tile; ascending by tile, then by sender, then by share.

    Attributes:
        rings: of the tiles.
        tiles, shares, entries: (messages,), of each.
    """

    __slots__ = ("entries", "rings", "shares", "tiles")

    def __init__(
        self,
        rings: Rings,
        senders: np.ndarray,
        tiles: np.ndarray,
        shares: np.ndarray,
        entries: np.ndarray,
        regions: Groups,
        cut: Mapping[int, Chunks],
    ) -> None:
        super().__init__(senders, regions, regions.numel, cut)
        self.rings, self.tiles, self.shares, self.entries = rings, tiles, shares, entries

    @classmethod
    def of(
        cls, pieces: Pieces, tile_sizes: np.ndarray, rings: Rings, chunks_of: Callable[[np.ndarray], np.ndarray]
    ) -> "RingMessages":
        """One message for each piece.

        Args:
            pieces: what is sent once.
            tile_sizes: elements of the tile of each piece.
            rings: of the tiles.
            chunks_of: into how many chunks messages of some numbers of elements are cut, at the most.
        """
        order = np.lexsort((pieces.shares, pieces.senders, pieces.tiles))
        tiles, regions = pieces.tiles[order], pieces.regions.take(order)
        # Where a piece lies in its tile says where it enters, so each replica has equally much to forward.
        entries = pieces.places[order] * rings.length // tile_sizes[order] + tiles
        parts = chunks_of(regions.numel)
        cut = {row: even_chunks(regions[row], int(parts[row])) for row in np.flatnonzero(parts > 1).tolist()}
        return cls(rings, pieces.senders[order], tiles, pieces.shares[order], entries, regions, cut)

    @property
    def links(self) -> ChainLinks:
        """See MessageTable."""
        length = self.rings.length
        rows = np.arange(len(self)).repeat(length)
        receivers = self.rings.at(self.tiles[rows], self.entries[rows], np.tile(np.arange(length), len(self)))
        sources = np.empty_like(receivers)
        sources[1:] = receivers[:-1]
        sources[::length] = self.senders
        return ChainLinks(rows, sources, receivers, np.arange(len(self)) * length)

    def receivers_of(self, row: int) -> tuple[int, ...]:
        """See MessageTable."""
        places = np.arange(self.rings.length)
        return tuple(self.rings.at(self.tiles[row], self.entries[row], places).tolist())


def ring_hops(
    messages: RingMessages,
    shares: int,
    senders: Mapping[int, int],
    participants: Sequence[int],
    topology: Topology,
    rank: int | None,
) -> Hops:
    """The hops of messages, each with its round, in order.

    Chunk c of a message makes the h-th of its hops between hosts in step c + h, as in ``routes.rounds``. All messages
    do so at once; where a rank would have too many of them in one step, the step has several rounds, and which of them
    a message is in follows from its share and from how far its tile's number is from its sender's: no two messages of
    a tile, and no two of a sender, agree in both.

    Args:
        messages: all those that ``rank`` has part in.
        shares: more than the number of any message's share.
        senders: the place of each source rank among them.
        participants: all ranks of either mesh, sorted.
        topology: which hops are within a host.
        rank: leave out other ranks' hops.
    """
    rings, length = messages.rings, messages.rings.length
    message = np.arange(len(messages)).repeat(length)
    place = np.tile(np.arange(length), len(messages))
    if rank is not None:
        message, place = _hops_of(messages, rank)
    tiles, entries = messages.tiles[message], messages.entries[message]
    into = rings.at(tiles, entries, place)
    out = np.where(place == 0, messages.senders[message], rings.at(tiles, entries, np.maximum(place - 1, 0)))
    circle = max(len(senders), len(rings.ranks))
    of_sender = np.array([senders[one] for one in messages.senders.tolist()], np.int64)
    distance = ((messages.tiles - of_sender) % circle * shares + messages.shares)[message]
    # Hop 0 enters the first host, hop 1 is the first within it.
    step = np.where(place == 0, 0, 1 + (place - 1) // rings.of_host)
    within = np.where(place == 0, 0, (place - 1) % rings.of_host)
    counts = messages.chunk_counts[message]
    hop = np.arange(len(message)).repeat(counts)
    chunk = np.arange(len(hop)) - offsets_of(counts)[hop]
    rounds = (step[hop] + chunk) * STEP_STRIDE + within[hop] * WITHIN_HOST_STRIDE + distance[hop] // MAX_PEERS_PER_ROUND
    table = np.column_stack((rounds, out[hop], into[hop], message[hop], chunk))
    return Hops(table[order_of_hops(table, participants, topology)])


def _hops_of(messages: RingMessages, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(message, place) of the hops that a rank sends or receives."""
    sent = np.flatnonzero(messages.senders == rank)
    rings, length = messages.rings, messages.rings.length
    at = np.argwhere(rings.ranks == rank)
    if not len(at):
        return sent, np.zeros(len(sent), np.int64)
    tile, host, replica = at[0].tolist()
    received = np.flatnonzero(messages.tiles == tile)
    entries = messages.entries[received]
    place = (host - entries) % rings.hosts * rings.of_host + (replica - entries // rings.hosts) % rings.of_host
    gives = place < length - 1
    return (
        np.concatenate([sent, received, received[gives]]),
        np.concatenate([np.zeros(len(sent), np.int64), place, place[gives] + 1]),
    )
