"""The boxes of global coordinates that chunks are, as columns."""

from collections.abc import Sequence

import numpy as np

from tricomm.layout.columns import Regions, counts_of, offsets_of, spread
from tricomm.plan.parts import PartGroups
from tricomm.plan.routes.chunks import Message, MessageTable


def chunk_boxes(
    messages: Sequence[Message], indices: np.ndarray, chunks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Find the boxes of global coordinates that some chunks are; None if messages are not columns, or if their parts
    are no boxes.

    Args:
        messages: of a move.
        indices: (chunks,), the message of each.
        chunks: (chunks,), its number in its message.

    Returns:
        The first box of each chunk, (chunks + 1,); where the boxes start and where they stop, (boxes, dims) each.
    """
    if not isinstance(messages, MessageTable) or not isinstance(messages.parts, PartGroups):
        return None
    groups = messages.parts.groups
    if not groups.single:
        return None
    spans = _spans(messages, groups.regions, indices, chunks)
    if spans is None:
        return None
    rows = groups.regions.rows[indices]
    firsts, begins, ends = spans
    starts = np.empty_like(rows)
    for dim, lists in enumerate(groups.regions.dims):
        at = lists.offsets[rows[:, dim]]
        if (lists.offsets[rows[:, dim] + 1] - at != 1).any():
            return None
        starts[:, dim] = lists.starts[at]
    starts = starts.repeat(counts_of(firsts), 0)
    return firsts, starts + begins, starts + ends


def _spans(
    messages: MessageTable, regions: Regions, indices: np.ndarray, chunks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Find where the pieces of chunks start and stop in their messages' regions, by place: (the first piece of each
    chunk, starts, stops); None if chunks have several parts.
    """
    pieces = np.ones(len(indices), np.int64)
    of_cut = np.flatnonzero(messages.chunk_counts[indices] > 1)
    known = messages.spans() if len(of_cut) else None
    if known is not None:
        numbers = known.first[indices[of_cut]] + chunks[of_cut]
        pieces[of_cut] = counts_of(known.firsts)[numbers]
    elif len(of_cut):
        return None
    firsts = offsets_of(pieces)
    rows = regions.rows[indices].repeat(pieces, 0)
    begins, ends = np.zeros_like(rows), np.zeros_like(rows)
    for dim, lists in enumerate(regions.dims):
        ends[:, dim] = lists.lengths[rows[:, dim]]
    if known is not None:
        at, spans = spread(firsts, of_cut), known.table[spread(known.firsts, numbers)]
        begins[at], ends[at] = spans[:, :, 0], spans[:, :, 1]
    return firsts, begins, ends
