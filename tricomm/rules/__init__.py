"""Index maps between the names and shapes of two systems, as data.

One side calls it ``q_proj``, ``k_proj`` and ``v_proj``, the other keeps the three in one tensor, in another order, with
rows of zeros at the end. A :class:`Rules` says so in torch's words, for all layers and experts at once:

>>> from tricomm.rules import Rules, cat, each, fill, source, stack
>>> rules = Rules(
...     {
...         "embed": cat([source("embed_tokens"), fill(0, (6, 4))], dim=0),
...         "layers.{l}.qkv": cat([source("l.{l}.q"), source("l.{l}.k"), source("l.{l}.v")], dim=0),
...         "layers.{l}.experts": stack([each("e", source("l.{l}.experts.{e}"))], dim=0),
...     },
...     l=range(2),
...     e=range(3),
... )

``source``, ``cat``, ``stack``, slices with steps, ``unflatten``, ``flatten``, ``permute``, ``expand`` and ``fill``
suffice for every layout of the field except changes of value (quantisation, ``1 + norm``) and private formats of
kernels, which are refused: what cannot be written cannot be meant. ``bind`` checks the map against source shapes:

>>> shapes = {"embed_tokens": (10, 4)}
>>> shapes |= {f"l.{l}.{x}": (8 if x == "q" else 2, 4) for l in range(2) for x in "qkv"}
>>> shapes |= {f"l.{l}.experts.{e}": (4, 5) for l in range(2) for e in range(3)}
>>> bound = rules.bind(shapes)
>>> print(bound)
embed (16, 4): 2 pieces of embed_tokens
layers.0.qkv (12, 4): 3 pieces of l.0.q, l.0.k, l.0.v
layers.1.qkv (12, 4): 3 pieces of l.1.q, l.1.k, l.1.v
layers.0.experts (3, 4, 5): 3 pieces of l.0.experts.0, l.0.experts.1, l.0.experts.2
layers.1.experts (3, 4, 5): 3 pieces of l.1.experts.0, l.1.experts.1, l.1.experts.2

A bound map is proven: every destination element is defined exactly once, and every source element is used or named in
``drop``. ``evaluate`` carries it out on whole arrays, ``reverse`` is the map back.

**For a planner.** A map speaks of coordinates, never of ranks: each side keeps a ``ShardingSpec`` for its own tensors,
fused and padded as they are. A destination is a tuple of disjoint :class:`Piece`: an n-d box of digits, each of which
walks along one dim of the destination and one of the source. What a rank holds is a product of intervals per dim, and
so is a piece: :func:`within` and :func:`within_source` cut a piece by a holding of either side into pieces again.
Each of them is an ordinary item of shape ``piece.shape``; only packing and unpacking see the strides, which
``piece.strided`` and ``piece.source_strided`` give for a tensor of any strides, and for a rank's shard after
:func:`to_local` and :func:`to_local_source`.

**What pads a tensor.** Megatron fills a vocabulary up to a multiple of 128 per rank, vLLM and SGLang to one of 64, each
with zeros that the other side has not. Where a side's tensors are moved with their padding, the map says so: ``cat``
with ``fill``, which ``reverse`` leaves out, and nothing of it travels. No placement does, since what a rank holds are
coordinates of one tensor, and those of the padding would be nobody's on the other side. Where the padding is to stay as
it is, no map is needed: ``padded.trimmed((130, 64))`` is the layout of the real rows on the ranks of a padded tensor,
and ``out`` is ``weight[:rows]`` of each rank's ``local_shape``.

Imports numpy, ``tricomm.errors`` and ``tricomm.layout``, never torch.
"""

from tricomm.rules.bound import BoundRules, BoundSource, BoundTensor
from tricomm.rules.boxes import Digit, Piece
from tricomm.rules.expressions import Expression
from tricomm.rules.meet import to_local, to_local_source, within, within_source
from tricomm.rules.rules import Rules
from tricomm.rules.words import cat, each, fill, source, stack

__all__ = [
    "BoundRules",
    "BoundSource",
    "BoundTensor",
    "Digit",
    "Expression",
    "Piece",
    "Rules",
    "cat",
    "each",
    "fill",
    "source",
    "stack",
    "to_local",
    "to_local_source",
    "within",
    "within_source",
]
