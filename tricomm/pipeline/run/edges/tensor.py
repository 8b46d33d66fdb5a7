"""EdgeTensor: one tensor that crosses an edge of a pipeline, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tricomm.autograd.layouts import gradient_specs
from tricomm.errors import SpecError
from tricomm.kinds import checks_kinds, explains_fields, refuse_wrong_kinds
from tricomm.layout.placement import Placement, Shard
from tricomm.layout.spec import ShardingSpec

WITHOUT_GRADIENT = ("int", "uint", "bool")
"""Element types that begin so are numbers that cannot have a gradient."""


@explains_fields
@dataclass(frozen=True, slots=True)
class EdgeTensor:
    """Describe one tensor that crosses an edge.

    >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec
    >>> source = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (8, 512), "float32")
    >>> hidden = EdgeTensor(source, ShardingSpec(Mesh([2], ("dp",)), (Replicate(),)))
    >>> hidden.destination.shape  # as the source's
    (8, 512)
    >>> changing = ShardingSpec(Mesh([0], ("dp",)), (Replicate(),), dtype="int64")
    >>> tokens = EdgeTensor(changing, ShardingSpec(Mesh([2], ("dp",)), (Replicate(),)), None, (8, "length"))
    >>> tokens.bound({"length": 100}).source.shape
    (8, 100)

    Attributes:
        source: its layout on the mesh of the source stage.
        destination: its layout on the mesh of the destination stage; shape and dtype default to the source's.
        gradient: the layout of the gradient that the destination stage computes, one placement per axis of its mesh.
            () is that of ``destination``: ranks that hold the same elements compute the same gradient, of which one
            copy travels. That is so if the stage sums gradients itself (as Megatron's column-parallel layers do).
            If each rank of an axis computes a share of the gradient, say ``Partial()`` for that axis: the shares
            are added. None: it has no gradient (tokens, a mask).
        shape: the global shape, if some of its sizes change from step to step: those are names, which ``bound``
            replaces, such as ``(8, "sequence", 512)``. The specs then have no shape. () means that they have it.

    Raises:
        SpecError: gradient placements that do not fit the mesh or cut other dims than the destination does, a gradient
            of integers, or a shape given in both places or in none.
    """

    source: ShardingSpec
    destination: ShardingSpec
    gradient: tuple[Placement, ...] | None = ()
    shape: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        fields = {"source": self.source, "destination": self.destination, "gradient": self.gradient}
        refuse_wrong_kinds(EdgeTensor.__init__, **fields, shape=self.shape)
        object.__setattr__(self, "shape", tuple(self.shape))
        if any(size == "" or (isinstance(size, int) and size < 0) for size in self.shape):
            raise SpecError(f"shape={self.shape} of an EdgeTensor must be of sizes from 0 and of names; give each one")
        object.__setattr__(self, "destination", self.destination.resolved(self.source))
        if (self.source.shape is None) != bool(self.shape):
            raise SpecError(
                f"an EdgeTensor with shape={self.shape} and source {self.source} must have its sizes in one place; "
                "give the source a shape, or leave it out there and write shape=(8, 'sequence', 512)"
            )
        for side in (self.source, self.destination):
            if self.gradient is not None and side.element_type.startswith(WITHOUT_GRADIENT):
                raise SpecError(
                    f"an EdgeTensor of {side.element_type} cannot have a gradient, which is of real numbers; write "
                    "EdgeTensor(source, destination, gradient=None)"
                )
        if self.gradient:
            object.__setattr__(self, "gradient", tuple(self.gradient))
            checked = replace(self.destination, placements=self.gradient)
            for axis, (own, other) in enumerate(zip(checked.placements, self.destination.placements, strict=True)):
                if own != other and checked.mesh.shape[axis] > 1 and isinstance(own, Shard):
                    raise SpecError(
                        f"gradient={self.gradient} cuts axis {checked.mesh.axis_names[axis]!r} by {own}, where the "
                        f"tensor has {other}; a gradient has the shape of its tensor: use {other} or Partial()"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sizes that change.

        >>> from tricomm import Mesh, Replicate
        >>> here, there = (ShardingSpec(Mesh([rank], ("x",)), (Replicate(),), dtype="int64") for rank in (0, 1))
        >>> EdgeTensor(here, there, None, (8, "length")).names
        ('length',)
        """
        return tuple(size for size in self.shape if isinstance(size, str))

    @checks_kinds
    def bound(self, sizes: Mapping[str, int]) -> "EdgeTensor":
        """Return the same with numbers for the names.

        Raises:
            SpecError: a name without a number.

        Example:
            >>> from tricomm import Mesh, Replicate
            >>> here, there = (ShardingSpec(Mesh([rank], ("x",)), (Replicate(),), dtype="int64") for rank in (0, 1))
            >>> EdgeTensor(here, there, None, (8, "length")).bound({"length": 100}).destination.shape
            (8, 100)
        """
        if not self.shape:
            return self
        missing = [name for name in self.names if name not in sizes]
        if missing:
            raise SpecError(f"shape={self.shape} has no size for {missing[0]!r}; the known sizes are {dict(sizes)}")
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)
        source = replace(self.source, shape=shape)
        return EdgeTensor(source, replace(self.destination, shape=shape), self.gradient)

    @checks_kinds
    def local_shape(self, rank: int, at_source: bool) -> tuple[int, ...]:
        """Return the shape of a rank's shard at one end of the edge; with numbers for all sizes.

        >>> from tricomm import Mesh, Replicate, Shard
        >>> rows = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (8, 512), "float32")
        >>> hidden = EdgeTensor(rows, ShardingSpec(Mesh([2], ("dp",)), (Replicate(),)))
        >>> hidden.local_shape(1, at_source=True), hidden.local_shape(2, at_source=False)
        ((4, 512), (8, 512))
        """
        return (self.source if at_source else self.destination).local_shape(rank)

    def gradient_specs(self) -> tuple[ShardingSpec, ShardingSpec]:
        """Return (layout of the gradient on the destination stage, on the source stage).

        >>> from tricomm import Mesh, Partial, Replicate
        >>> one = ShardingSpec(Mesh([0], ("dp",)), (Replicate(),), (8,), "float32")
        >>> two = ShardingSpec(Mesh([1, 2], ("tp",)), (Replicate(),))
        >>> print(*EdgeTensor(one, two, gradient=(Partial(),)).gradient_specs(), sep="; ")
        float32[8] sum over tp on (tp=2: ranks 1-2); float32[8] replicated over dp on (dp=1: rank 0)
        """
        computed, wanted = gradient_specs(self.source, self.destination)
        return (replace(computed, placements=self.gradient) if self.gradient else computed), wanted
