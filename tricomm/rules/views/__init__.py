"""Pieces as ordinary tensors: what each rank holds of one side of a piece, as a layout and as a strided view.

A piece is a box of digits that walks through a tensor on either side. A :class:`View` is one of these sides. With the
layout of the tensor it becomes a layout of the box (``laid``), so that a planner moves a piece as any tensor; and with
what a rank holds, an offset and strides in the rank's shard (``View.placed``), so that pack and unpack do too. A piece
of which some rank holds what is no box, or lies in no one walk of its shard, is cut until it is (``settled``).
"""
