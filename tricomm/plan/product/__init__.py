"""Moves between product layouts by formulas: what one rank sends, receives and forwards, without the others' parts.

The layouts of this field are products: mesh axes times chunks. There the ranks that hold an element are a coset of the
source's mesh axes and those that need it one of the destination's, so nothing has to be searched:

- ``grid``: which ranks hold a tile, from its number per dim; the replicas of a tile as a ring, host by host.
- ``pieces``: a *cell* is what a source tile and a destination tile have in common. The holders of a source tile share
  its cells like a line that is cut into parts (McNaughton's wrap-around rule), so no pair of ranks has more than one
  piece.
- ``sharing``, ``nics``: how many of the holders send, and whether all of them or all of their NICs send the same: no
  more than keep the receivers' NICs busy, as every message costs time.
- ``rings``: where sending each replica a copy would keep the source's NICs too long, a piece enters the ring of its
  tile's replicas at a place that follows from where it lies in the tile, so that all replicas forward alike; from
  there it goes from host to host in a chain or, where many hosts would fill slowly, in a tree of two below each; or,
  where hosts are few, its holder gives it to each of them by itself.
- ``shared``: where hosts have ranks of both meshes, what is there stays there, and the hosts of the ring between two
  such get the cell from all of its holders.
- ``move``: a move, and its routes by a way; ``loads``, ``choose``, ``way``, ``tried``: which of the ways it is, and in
  how many chunks, from what the busiest NIC would carry; or, where ranks are few, from what a simulation of each finds.

The plan of all ranks is the union of theirs: the same formulas over all cells. Imports ``layout`` and the rest of
``plan``, never torch.
"""
