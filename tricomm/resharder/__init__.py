"""Resharder: a plan carried out again and again by the ranks of a process group.

``connected`` has what is between it and the other ranks, ``selections`` the Resharders that are made of it, ``calls``
how it is called, ``resharder`` how it is made. May import all that a move needs: layouts, plans, packing, transport,
gradients.
"""

from tricomm.resharder.resharder import Resharder

__all__ = ["Resharder"]
