"""What Hypothesis draws: pairs of layouts with everything that DESIGN.md lists, on up to eight ranks."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tricomm import (
    Auto,
    Broadcast,
    Ensemble,
    GlobalAllGather,
    LeastLoaded,
    LocalAllGather,
    Mesh,
    Naive,
    Partial,
    RandomizedGreedy,
    Replicate,
    Search,
    SendRecv,
    Shard,
    ShardingSpec,
    SpecError,
    Split,
    Topology,
)
from tricomm.layout.dtype import ITEMSIZE, check_cast, check_reduction

RANKS = 8
MOVED_DTYPES = sorted(ITEMSIZE)
CAST_DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int8",
    "uint8",
    "complex64",
]
REDUCED_DTYPES = [
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e5m2",
    "int32",
    "uint8",
    "uint16",
    "uint64",
    "complex32",
    "complex64",
    "bool",
]
# Strategies are made once: Hypothesis looks at each new one, which costs more than drawing from it.
EXTENTS = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12])
SHAPES = st.lists(EXTENTS, max_size=5)
AXES = st.integers(1, 4)
QUARTERS = st.integers(0, 3)
FIFTHS = st.integers(0, 4)
SIXTHS = st.integers(0, 5)
HOSTS = st.integers(0, 4**RANKS - 1).map(lambda number: [number >> 2 * rank & 3 for rank in range(RANKS)])
BOOLEANS = st.booleans()
PLACEMENT_KINDS = st.sampled_from(["shard", "shard", "replicate", "partial"])
SUM_OR_AVG = st.sampled_from(["sum", "avg"])


MOST_CHUNKS = 48
"""Of the bytes of a case, or of a set of them: enough to reorder, not so many that one case takes a second."""


def of_random_draws(variable: str, examples: int) -> settings:
    """The settings of a test of what is drawn: as many examples each time, and the same ones; but where a variable of
    the environment asks for a number it is others in each run, or those of pytest's ``--hypothesis-seed``.
    """
    return settings(
        max_examples=int(os.environ.get(variable, examples)),
        deadline=None,
        database=None,
        print_blob=True,
        derandomize=variable not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


@cache
def integers(first: int, last: int) -> st.SearchStrategy[int]:
    return st.integers(first, last)


def shuffled(draw: Any, items: Sequence[Any]) -> list[Any]:
    """The items in any order, of one number: drawing takes longer than most of what is tested. 0 changes nothing."""
    number, left, result = draw(integers(0, math.factorial(len(items)) - 1)), list(items), []
    while left:
        number, place = divmod(number, len(left))
        result.append(left.pop(place))
    return result


@dataclass(frozen=True)
class Case:
    """One reshard and how to run it."""

    source: ShardingSpec
    destination: ShardingSpec
    strategy: Any
    balance: Any
    topology: Topology | None
    staging_bytes: int
    strides: str = "contiguous"

    def plan_arguments(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "balance": self.balance,
            "topology": self.topology,
            "staging_bytes": self.staging_bytes,
        }


@st.composite
def meshes(draw: Any, ranks: int = RANKS) -> Mesh:
    """1 to 4 axes, any ranks in any order; two of them are disjoint, overlap or coincide."""
    shape: list[int] = []
    size = 1
    for _ in range(draw(AXES)):
        extent = draw(integers(1, max(1, ranks // size)))
        shape.append(extent)
        size *= extent
    if draw(BOOLEANS):
        start = draw(integers(0, ranks - size))
        flat = list(range(start, start + size))
    else:
        flat = shuffled(draw, range(ranks))[:size]
    nested: Any = flat
    for extent in reversed(shape[1:]):
        nested = [nested[i : i + extent] for i in range(0, len(nested), extent)]
    return Mesh(nested, tuple(f"axis{i}" for i in range(len(shape))))


MESHES = meshes()


def placements(draw: Any, mesh: Mesh, shape: tuple[int, ...], op: str | None) -> tuple[Any, ...]:
    result: list[Any] = []
    for _ in range(mesh.ndim):
        kind = draw(PLACEMENT_KINDS)
        if kind == "partial" and op is not None:
            result.append(Partial(draw(SUM_OR_AVG) if op == "avg" else op))
        elif kind == "shard" and shape:
            dim = draw(integers(-len(shape), len(shape) - 1))
            segments = None
            if draw(QUARTERS) == 0:
                extent = shape[dim]
                cuts = sorted(draw(integers(0, extent)) for _ in range(draw(QUARTERS)))
                edges = [0, *cuts, extent]
                segments = tuple(b - a for a, b in pairwise(edges))
            result.append(Shard(dim, segments))
        else:
            result.append(Replicate())
    return tuple(result)


@st.composite
def specs(draw: Any, shape: tuple[int, ...], dtype: str, op: str | None = None, whole: bool = False) -> ShardingSpec:
    mesh = draw(MESHES)
    order = tuple(shuffled(draw, range(mesh.ndim))) if draw(BOOLEANS) else None
    spec = ShardingSpec(mesh, placements(draw, mesh, shape, op), shape, dtype, order)
    if spec.partial_axes or op is not None or draw(FIFTHS):
        return spec
    return explicit(draw, spec, whole)


def explicit(draw: Any, spec: ShardingSpec, whole: bool) -> ShardingSpec:
    """The same holdings, with intervals cut, shuffled and some repeated; a destination may also drop ranks."""
    holdings = {}
    for rank in spec.mesh.ranks:
        if not whole and holdings and draw(FIFTHS) == 0:
            continue
        holding = []
        for intervals in spec.holding(rank):
            pieces = []
            for start, stop in intervals:
                cut = draw(integers(start, stop))
                pieces += [(start, cut), (cut, stop)]
            if pieces and draw(QUARTERS) == 0:
                pieces.append(pieces[draw(integers(0, len(pieces) - 1))])  # in two slots of the rank
            holding.append(tuple(shuffled(draw, pieces)))
        holdings[rank] = tuple(holding)
    return ShardingSpec.explicit(holdings, spec.global_shape, spec.dtype)


def allowed(check: Any, *arguments: str) -> bool:
    try:
        check(*arguments)
    except SpecError:
        return False
    return True


CASE_KINDS = st.sampled_from(["move", "move", "cast", "partial"])
CASTS = st.sampled_from([(a, b) for a in CAST_DTYPES for b in CAST_DTYPES if allowed(check_cast, a, b)])
REDUCTIONS = st.sampled_from(
    [
        (op, dtype)
        for op in ("sum", "avg", "max", "min")
        for dtype in REDUCED_DTYPES
        if allowed(check_reduction, op, dtype)
    ]
)
DTYPES = st.sampled_from(MOVED_DTYPES)
RATES = st.sampled_from([1e6, 12.5e9])
FACTORS = st.integers(1, 3)
CHUNKS = st.sampled_from([None, None, 1, 16, 64, 1000])
BALANCES = st.sampled_from([Split(), Split(), Naive(), LeastLoaded(), Search(50), RandomizedGreedy(3), Ensemble()])
STAGING = st.sampled_from([1 << 20, 256 << 20])
STRIDES = st.sampled_from(["contiguous", "transposed", "padded"])


@st.composite
def cases(draw: Any) -> Case:
    shape = tuple(draw(SHAPES))
    kind = draw(CASE_KINDS)
    op = None
    if kind == "cast":
        dtype, target = draw(CASTS)
    elif kind == "partial":
        op, dtype = draw(REDUCTIONS)
        target = dtype
    else:
        dtype = target = draw(DTYPES)
    source = draw(specs(shape, dtype, op, whole=True))
    destination = draw(specs(shape, target))
    topology = None
    if draw(BOOLEANS):
        hosts = tuple(f"host{number}" for number in draw(HOSTS))
        rate = draw(RATES)
        rates = {host: (rate * draw(FACTORS), rate * draw(FACTORS)) for host in sorted({*hosts})}
        topology = Topology(hosts, rates if draw(BOOLEANS) else rate, nics_per_host=draw(FACTORS))
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    chunk = draw(CHUNKS)
    if chunk is not None:
        chunk = max(chunk, nbytes // MOST_CHUNKS)
    strategies = [Auto(), Auto(0), SendRecv(chunk), Broadcast(chunk), LocalAllGather(chunk), GlobalAllGather(chunk)]
    strategies.append(Broadcast(chunk, one_call=True))
    strategy = strategies[draw(SIXTHS)]
    return Case(source, destination, strategy, draw(BALANCES), topology, draw(STAGING), draw(STRIDES))
