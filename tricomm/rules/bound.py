"""A map bound to shapes: what each destination tensor consists of, and the map back."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tricomm.errors import SpecError
from tricomm.kinds import checks_fields, checks_kinds
from tricomm.layout.dtype import check_cast
from tricomm.rules.boxes import REPEATED, Digit, Piece, renumbered
from tricomm.rules.checks import Shape
from tricomm.rules.coalesce import coalesced
from tricomm.rules.cover import cover, defines_exactly_once, without
from tricomm.rules.evaluate import checked, evaluated
from tricomm.rules.meet import through

Known = dict[object, tuple[tuple[Piece, ...], tuple[int, ...]]]
"""Work that tensors share: pieces, and which of the tensors' sources they read, in order."""


@dataclass(frozen=True, slots=True)
class BoundSource:
    """A source tensor: name, shape and dtype (None if it was not given).

    Example:
        >>> from tricomm.rules import Rules, source
        >>> Rules({"b": source("a", (2,))}).bind(dtypes={"a": "float32"}).sources
        (BoundSource(name='a', shape=(2,), dtype='float32'),)
    """

    name: str
    shape: Shape
    dtype: str | None


@dataclass(frozen=True, slots=True)
class BoundTensor:
    """A destination tensor.

    Attributes:
        name, shape, dtype: the tensor's; dtype is None if the sources' were not given.
        sources: names of the tensors that it is made of, in the order in which the pieces count them.
        pieces: disjoint boxes that together are the whole tensor.
        rule: the rule that it comes from; two tensors are equal whatever rules made them.

    Example:
        >>> from tricomm.rules import Rules, cat, source
        >>> bound = Rules({"qk": cat([source("q", (8, 4)), source("k", (2, 4))])}).bind()
        >>> print(bound.tensors[0])
        qk (10, 4): 2 pieces of q, k
        >>> print(bound.tensors[0].pieces[1])
        [2, 4] at [8, 0] <- tensor 1 at [0, 0]: 2(d0+1 <- d0+1) 4(d1+1 <- d1+1)
    """

    name: str
    shape: Shape
    dtype: str | None
    sources: tuple[str, ...]
    pieces: tuple[Piece, ...]
    rule: str = field(compare=False)

    def __str__(self) -> str:
        dtype = "" if self.dtype is None else f" {self.dtype}"
        count = "1 piece" if len(self.pieces) == 1 else f"{len(self.pieces)} pieces"
        return f"{self.name} {self.shape}{dtype}: {count} of {', '.join(self.sources) or 'fills'}"


@checks_fields
@dataclass(frozen=True, slots=True)
class BoundRules:
    """A map of whole tensors, checked and proven: each destination element is defined exactly once.

    Attributes:
        tensors: the destinations, in the order of the rules.
        sources: the source tensors, those that are dropped too.

    Example:
        >>> from tricomm.rules import Rules, source
        >>> bound = Rules({"b": source("a", (2, 3)).permute(1, 0)}).bind()
        >>> bound.shapes, bound.source_shapes, bound.reverse().shapes
        ({'b': (3, 2)}, {'a': (2, 3)}, {'a': (2, 3)})
    """

    tensors: tuple[BoundTensor, ...]
    sources: tuple[BoundSource, ...]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape by destination name.

        >>> from tricomm.rules import Rules, cat, fill, source
        >>> Rules({"embed": cat([source("e"), fill(0, (6, 4))])}).bind({"e": (10, 4)}).shapes
        {'embed': (16, 4)}
        """
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def dtypes(self) -> dict[str, str | None]:
        """Dtype by destination name.

        >>> from tricomm.rules import Rules, source
        >>> Rules({"b": source("a").to("bfloat16"), "c": source("a")}).bind({"a": (2,)}, dtypes={"a": "float32"}).dtypes
        {'b': 'bfloat16', 'c': 'float32'}
        """
        return {tensor.name: tensor.dtype for tensor in self.tensors}

    @property
    def source_shapes(self) -> dict[str, Shape]:
        """Shape by source name.

        >>> from tricomm.rules import Rules, source
        >>> Rules({"b": source("a", (4, 2))[:2]}, drop=["a", "c"]).bind({"a": (4, 2), "c": (3,)}).source_shapes
        {'a': (4, 2), 'c': (3,)}
        """
        return {source.name: source.shape for source in self.sources}

    def __str__(self) -> str:
        return "\n".join(map(str, self.tensors))

    @checks_kinds
    def evaluate(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The destination tensors, made in this process.

        Args:
            arrays: a numpy array or a torch tensor by source name, of any strides.

        Example:
            >>> from tricomm.rules import Rules, cat, fill, source
            >>> bound = Rules({"embed": cat([source("e"), fill(0, (2,))])}).bind({"e": (3,)})
            >>> bound.evaluate({"e": np.array([7, 8, 9])})
            {'embed': array([7, 8, 9, 0, 0])}
        """
        like = next(iter(arrays.values()), np.empty(0))
        known = {source.name: source for source in self.sources}
        result = {}
        for tensor in self.tensors:
            sources = [known[name] for name in tensor.sources]
            held = [checked(arrays, source.name, source.shape, source.dtype) for source in sources]
            result[tensor.name] = evaluated(tensor.name, tensor.shape, tensor.dtype, tensor.pieces, held, like)
        return result

    @checks_kinds
    def reverse(self, *, drop: Sequence[str] = (), fill: float | None = None) -> "BoundRules":
        """The map back: this map and then that one give every source element back, bit for bit unless it was cast.

        Fills are left out, and of several copies of one element the first in the order of the rules is read. That
        each element is defined exactly once is proven again. Sources that this map drops whole are not made.

        Args:
            drop: patterns of names of sources that are not wanted back.
            fill: the value of source elements that this map drops; without it they are an error.

        Raises:
            SpecError: elements of a source are lost, or a cast cannot be undone.

        Example:
            >>> from tricomm.rules import Rules, cat, fill, source
            >>> padded = Rules({"embed": cat([source("e", (10, 4)), fill(0, (6, 4))])}).bind()
            >>> print(padded.reverse())
            e (10, 4): 1 piece of embed
        """
        unwanted = re.compile("|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in drop) or "(?!)")
        feeds: dict[str, list[tuple[BoundTensor, Piece]]] = {source.name: [] for source in self.sources}
        for tensor in self.tensors:
            for piece in tensor.pieces:
                if piece.tensor is not None:
                    feeds[tensor.sources[piece.tensor]].append((tensor, piece))
        known: Known = {}
        made = [
            _turned(source, feeds[source.name], fill, known)
            for source in self.sources
            if feeds[source.name] and not unwanted.fullmatch(source.name)
        ]
        return BoundRules(tuple(made), tuple(BoundSource(one.name, one.shape, one.dtype) for one in self.tensors))

    def without_dtypes(self) -> "BoundRules":
        """The same map for sources of any dtypes.

        Example:
            >>> from tricomm.rules import Rules, source
            >>> Rules({"b": source("a", (2,))}).bind(dtypes={"a": "float32"}).without_dtypes().dtypes
            {'b': None}
        """
        tensors = tuple([replace(tensor, dtype=None) for tensor in self.tensors])
        return BoundRules(tensors, tuple([replace(source, dtype=None) for source in self.sources]))

    @checks_kinds
    def then(self, other: "BoundRules") -> "BoundRules":
        """This map and then the other as one: nothing is made in between.

        So a trainer's tensors go to a server's by two maps that each know one system:
        ``megatron(model).bind().reverse().then(vllm(model).bind())``.

        Args:
            other: a map of which every source that it reads is a destination of this one, of the same shape and dtype.

        Raises:
            SpecError: the two do not meet, or elements would be rounded to a dtype in between.

        Example:
            >>> from tricomm.rules import Rules, cat, source
            >>> first = Rules({"qk": cat([source("q", (8, 4)), source("k", (2, 4))])}).bind()
            >>> second = Rules({"k": source("qk", (10, 4))[8:], "q": source("qk", (10, 4))[:8]}).bind()
            >>> print(first.then(second))
            k (2, 4): 1 piece of k
            q (8, 4): 1 piece of q
        """
        between = {tensor.name: tensor for tensor in self.tensors}
        dtypes = {source.name: source.dtype for source in self.sources}
        wanted = {source.name: source for source in other.sources}
        known: Known = {}
        made = []
        for tensor in other.tensors:
            for name in tensor.sources:
                _require_meeting(tensor, wanted[name], between.get(name), dtypes)
            made.append(_composed(tensor, [between[name] for name in tensor.sources], known))
        return BoundRules(tuple(made), self.sources)


def _require_meeting(
    tensor: BoundTensor, wanted: BoundSource, found: BoundTensor | None, dtypes: Mapping[str, str | None]
) -> None:
    where = f"rule {tensor.rule!r} reads {wanted.name!r}"
    if found is None:
        raise SpecError(f"{where}, which the map before it does not make; add a rule for it there")
    if found.shape != wanted.shape or (None not in (found.dtype, wanted.dtype) and found.dtype != wanted.dtype):
        raise SpecError(
            f"{where} as {wanted.shape} {wanted.dtype}, but the map before it makes {found.shape} {found.dtype}; bind "
            "the second map to the shapes and dtypes of the first"
        )
    for name in found.sources:
        if found.dtype not in (dtypes[name], tensor.dtype):
            raise SpecError(
                f"{where}, which rounds {name!r} from {dtypes[name]} to {found.dtype} on the way to {tensor.dtype}; "
                "cast in one of the two maps only"
            )


def _composed(tensor: BoundTensor, between: Sequence[BoundTensor], known: Known) -> BoundTensor:
    place: dict[str, int] = {}
    numbers = [tuple([place.setdefault(name, len(place)) for name in one.sources]) for one in between]
    key = (tensor.pieces, tuple([(one.pieces, order) for one, order in zip(between, numbers, strict=True)]))
    if key not in known:
        parts: list[Piece] = []
        for piece in tensor.pieces:
            if piece.tensor is None:
                parts.append(piece)
                continue
            for part in through(piece, between[piece.tensor].pieces):
                number = None if part.tensor is None else numbers[piece.tensor][part.tensor]
                parts.append(Piece(part.digits, part.start, part.source_start, number, part.value))
        pieces, order = renumbered(coalesced(parts))
        if not defines_exactly_once(tensor.shape, pieces):
            raise SpecError(
                f"rule {tensor.rule!r} after another map is not whole; this is a fault of tricomm, report it"
            )
        known[key] = pieces, order
    pieces, order = known[key]
    names = tuple(place)
    sources = tuple([names[index] for index in order])
    return BoundTensor(tensor.name, tensor.shape, tensor.dtype, sources, pieces, tensor.rule)


def _turned(
    source: BoundSource,
    feeds: Sequence[tuple[BoundTensor, Piece]],
    fill: float | None,
    known: Known,
) -> BoundTensor:
    """A source as a destination of the map back."""
    place: dict[str, int] = {}
    parts = [(piece, place.setdefault(tensor.name, len(place))) for tensor, piece in feeds]
    for tensor, _ in feeds:
        if source.dtype is not None and tensor.dtype is not None:
            check_cast(tensor.dtype, source.dtype)
    key = (source.shape, *[(id(piece), number) for piece, number in parts])  # layers share pieces
    if key not in known:
        turned = tuple([piece.turned(number) for piece, number in parts])
        known[key] = _once(source, turned, fill, feeds[0][0].rule)
    pieces, order = known[key]
    names = tuple(place)
    return BoundTensor(
        source.name, source.shape, source.dtype, tuple([names[index] for index in order]), pieces, feeds[0][0].rule
    )


def _once(
    source: BoundSource, turned: tuple[Piece, ...], fill: float | None, rule: str
) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """The pieces without those elements that earlier ones define already."""
    shape = source.shape
    found = cover(shape, turned)
    kept = list(turned)
    if found.repeated is not None:
        kept = []
        for piece in turned:
            kept += without([piece], kept)
    if found.missing is not None:
        if fill is None:
            raise SpecError(
                f"rule {rule!r} cannot be reversed: {found.missing_numel} elements of {source.name!r} {shape} are "
                f"carried nowhere, the first at {list(found.missing)}; write reverse(fill=0), or "
                f"reverse(drop=[{source.name!r}])"
            )
        still = tuple([Digit(size, dim, 1, REPEATED, 0) for dim, size in enumerate(shape) if size > 1])
        kept += without([Piece(still, (0,) * len(shape), (), None, fill)], kept)
    pieces, order = renumbered(coalesced(kept))
    if not defines_exactly_once(shape, pieces):
        raise SpecError(
            f"the reverse of rule {rule!r} defines {source.name!r} twice or not at all; "
            "this is a fault of tricomm, report it"
        )
    return pieces, order
