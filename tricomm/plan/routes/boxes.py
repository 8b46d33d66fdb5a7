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
    if len(begins) > len(starts):
        starts = starts.repeat(counts_of(firsts), 0)
    return firsts, starts + begins, starts + ends


def _spans(
    messages: MessageTable, regions: Regions, indices: np.ndarray, chunks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Find where the pieces of chunks start and stop in their messages' regions, by place: (the first piece of each
    chunk, starts, stops); None if chunks have several parts.
    """
    rows = regions.rows[indices]
    of_cut = np.flatnonzero(messages.chunk_counts[indices] > 1)
    firsts = np.arange(len(indices) + 1)
    if len(of_cut):
        cuts = messages.cuts()
        if cuts.spans is None:
            return None
        chosen = cuts.first[indices[of_cut]] + chunks[of_cut]
        if not cuts.are_whole:
            counts = np.ones(len(indices), np.int64)
            counts[of_cut] = cuts.firsts[chosen + 1] - cuts.firsts[chosen]
            firsts, rows = offsets_of(counts), rows.repeat(counts, 0)
            chosen, of_cut = spread(cuts.firsts, chosen), spread(firsts, of_cut)
        spans = cuts.spans[chosen]
        if len(of_cut) == len(rows):
            return firsts, spans[:, :, 0], spans[:, :, 1]
    begins, ends = np.zeros_like(rows), np.empty_like(rows)
    for dim, lists in enumerate(regions.dims):
        ends[:, dim] = lists.lengths[rows[:, dim]]
    if len(of_cut):
        begins[of_cut], ends[of_cut] = spans[:, :, 0], spans[:, :, 1]
    return firsts, begins, ends
