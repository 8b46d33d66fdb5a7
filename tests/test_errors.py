"""What every refusal says: the value, the rule that it breaks and the remedy. Messages are part of the interface."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tricomm import (
    Broadcast,
    LocalTransport,
    Mesh,
    Partial,
    Plan,
    PlanError,
    Replicate,
    Search,
    SendRecv,
    Shard,
    ShardingSpec,
    SpecError,
    Topology,
    TransportError,
    TricommError,
    autograd,
    local_shard,
    make_plan,
)
from tricomm.layout import dtype as dtypes
from tricomm.layout import mesh, notation, placement, topology
from tricomm.layout import spec as sharding
from tricomm.packing import tables as packing
from tricomm.packing import tensors
from tricomm.plan import plan, planner, tasks
from tricomm.plan.routes import strategies

MODULES: list[ModuleType] = [
    autograd,
    dtypes,
    mesh,
    notation,
    packing,
    placement,
    plan,
    planner,
    strategies,
    sharding,
    tasks,
    tensors,
    topology,
]
GRID = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
PAIR = Mesh([0, 1], ("x",))
OTHERS = Mesh([2, 3], ("x",))
ROWS = ShardingSpec(PAIR, (Shard(0),), (8, 4), "float32")
COLUMNS = ShardingSpec(OTHERS, (Shard(1),))


def on_grid(*placements: Any, shape: Any = (8, 4), order: Any = None) -> ShardingSpec:
    return ShardingSpec(GRID, placements, shape, "float32", order)


def letters(*dims: Any) -> ShardingSpec:
    return ShardingSpec.from_dims(GRID, dims, (8, 4), "float32")


def explicit(*intervals: tuple[int, int], dims: int = 1) -> ShardingSpec:
    """Rank 5 holds these intervals of 8 elements."""
    return ShardingSpec.explicit({5: (intervals,) * dims}, (8,), "int8")


def move(*, source: ShardingSpec = ROWS, destination: ShardingSpec = COLUMNS, **options: Any) -> Plan:
    return make_plan(source, destination, **options)


def run(replaced: dict[int, torch.Tensor | None], **options: Any) -> dict[int, torch.Tensor]:
    """Move shards of which some are replaced; None takes one away."""
    shards = {0: torch.zeros(4, 4), 1: torch.zeros(4, 4), **replaced}
    return LocalTransport().run(move(**options), {r: t for r, t in shards.items() if t is not None})


def receive_into(out: torch.Tensor, rank: int = 2, source: torch.Tensor | None = None) -> torch.Tensor | None:
    return tensors.Contract(move(), rank, torch.device("cpu")).check_out(out, source)


def receive_into_the_source() -> torch.Tensor | None:
    buffer = torch.zeros(32)
    return receive_into(buffer[15:31].view(8, 2), 2, buffer[:16].view(4, 4))


def impossible_cast() -> None:
    """Torch has every cast that tricomm allows, so the plan is one that make_plan would refuse."""
    cast = move(destination=replace(COLUMNS, dtype="float64"))
    tensors.check_casts(replace(cast, source=replace(cast.source, dtype="bits8")))


def nobody_holds() -> Plan:
    source = ShardingSpec.explicit({0: (((0, 3), (5, 8)),)}, (8,), "int8")
    return make_plan(source, ShardingSpec(OTHERS, (Shard(0),)))


def of_one_rank(name: str) -> Any:
    """A question that only the plan of all ranks can answer."""
    answer = getattr(move(rank=2), name)
    return answer() if callable(answer) else answer


class Subclass(torch.Tensor):
    pass


# What is wrong: (the call, the error, then what its text must hold: the value, the rule, the remedy).
# fmt: off
REFUSALS: dict[str, tuple[Callable[[], Any], type[TricommError], str, str, str]] = {
    # dtype.py
    "dtype unknown": (lambda: replace(ROWS, dtype="float31"), SpecError,
        "'float31'", "not an element type", "use one of bf"),
    "dtype not a name": (lambda: replace(ROWS, dtype=4), SpecError,
        "dtype 4", "not an element type", "use one of bf"),
    "cast of bits": (
        lambda: move(source=replace(ROWS, dtype="bits8"), destination=replace(COLUMNS, dtype="int8")), SpecError,
        "bits8 to int8", "bits8 has no cast", "give both specs the same dtype"),
    "cast to bits": (lambda: dtypes.check_cast("float32", "float4_e2m1fn_x2"), SpecError,
        "float32 to float4_e2m1fn_x2", "float4_e2m1fn_x2 has no cast", "give both specs the same dtype"),
    "cast to real": (
        lambda: move(source=replace(ROWS, dtype="complex64"), destination=replace(COLUMNS, dtype="float32")), SpecError,
        "complex64 to float32", "imaginary part would be lost", "pass torch.view_as_real(tensor)"),
    "sum of bits": (lambda: move(source=replace(ROWS, placements=(Partial(),), dtype="bits16")), SpecError,
        "Partial('sum') cannot reduce bits16", "no arithmetic", "cast the tensor"),
    "maximum of complex": (
        lambda: move(source=replace(ROWS, placements=(Partial("max"),), dtype="complex64")), SpecError,
        "Partial('max') cannot reduce complex64", "no order", "choose another op"),
    "average of integers": (lambda: move(source=replace(ROWS, placements=(Partial("avg"),), dtype="int32")), SpecError,
        "Partial('avg') cannot reduce int32", "not an integer", "choose another op"),
    "sum of booleans": (lambda: move(source=replace(ROWS, placements=(Partial(),), dtype="bool")), SpecError,
        "Partial('sum') cannot reduce bool", "not a boolean", "choose another op"),
    # mesh.py
    "rank a string": (lambda: Mesh("01", ("x",)), SpecError,
        "'01'", "nested sequence of integer ranks", "write [[0, 1], [2, 3]]"),
    "rank a float": (lambda: Mesh([0, 1.0], ("x",)), SpecError,
        "1.0", "nested sequence of integer ranks", "write [[0, 1], [2, 3]]"),
    "mesh empty": (lambda: Mesh([], ("x",)), SpecError,
        "holds no ranks", "every axis", "at least one"),
    "mesh with an empty row": (lambda: Mesh([[0], []], ("x", "y")), SpecError,
        "holds no ranks", "every axis", "at least one"),
    "mesh ragged": (lambda: Mesh([[0, 1], [2]], ("x", "y")), SpecError,
        "entry 0 has shape (2,) and entry 1 has shape (1,)", "must be rectangular", "give every row the same number"),
    "mesh of two depths": (lambda: Mesh([0, [1]], ("x",)), SpecError,
        "entry 1 has shape (1,)", "rectangular", "give every row"),
    "names a string": (lambda: Mesh([0, 1], "tp"), SpecError,
        "axis_names='tp'", "not a tuple of names", "write one name per axis"),
    "names missing": (lambda: Mesh([0, 1], None), SpecError,
        "axis_names=None", "not a tuple of names", "write one name per axis"),
    "names too many": (lambda: Mesh([0, 1], ("dp", "tp")), SpecError,
        "axis_names=('dp', 'tp') gives 2 names", "mesh with 1 axes", "give one name per axis"),
    "names twice": (lambda: Mesh([[0, 1]], ("tp", "tp")), SpecError,
        "('tp', 'tp')", "must be distinct", "rename an axis"),
    "name empty": (lambda: Mesh([0, 1], ("",)), SpecError,
        "('',)", "non-empty strings", "rename an axis"),
    "rank negative": (lambda: Mesh([0, -1], ("x",)), SpecError,
        "rank -1", "is negative", "count from 0"),
    "rank twice": (lambda: Mesh([[0, 4], [4, 1]], ("x", "y")), SpecError,
        "rank 4", "twice", "may hold one place only"),
    "rank elsewhere": (lambda: GRID.position(7), SpecError,
        "rank 7", "not in (dp=2 tp=2: ranks 0-3)", "one of its ranks 0-3"),
    "shape of a rank elsewhere": (lambda: ROWS.local_shape(2), SpecError,
        "rank 2", "not in (x=2:", "one of its ranks 0-1"),
    "axis name unknown": (lambda: GRID.axis("pp"), SpecError,
        "axis 'pp'", "not an axis", "its axes are ('dp', 'tp'), numbered from 0"),
    "axis number unknown": (lambda: GRID.axis(-1), SpecError,
        "axis -1", "not an axis", "its axes are ('dp', 'tp'), numbered from 0"),
    # placement.py
    "dim a name": (lambda: Shard("rows"), SpecError,
        "Shard(dim='rows')", "must be an integer", "name one tensor dim"),
    "dim a boolean": (lambda: Shard(True), SpecError,
        "Shard(dim=True)", "must be an integer", "name one tensor dim"),
    "segment negative": (lambda: Shard(0, (4, -1)), SpecError,
        "(4, -1)", "sizes of at least 0", "give the size of each fused part"),
    "segments empty": (lambda: Shard(0, ()), SpecError,
        "segments=()", "sizes of at least 0", "give the size of each fused part"),
    "reduction unknown": (lambda: Partial("prod"), SpecError,
        "Partial('prod')", "one of sum, avg, max, min", "reduce before resharding"),
    # notation.py
    "dims a string": (lambda: ShardingSpec.from_dims(GRID, "S0"), SpecError,
        "dims='S0'", "one string", 'one entry per tensor dim: ("S0", "R")'),
    "letter unknown": (lambda: letters("S0", "P"), SpecError,
        "entry 'P' of dims=('S0', 'P')", 'neither "R" nor "S"', 'write "S01"'),
    "letter without axes": (lambda: letters("S", "R"), SpecError,
        "entry 'S'", 'neither "R" nor "S"', 'write "S01"'),
    "letter with an unknown axis": (lambda: letters("S02", "R"), SpecError,
        "entry 'S02'", "names mesh axis 2", "axes 0 to 1"),
    "axis in two dims": (lambda: letters("S1", "S01"), SpecError,
        "('S1', 'S01')", "use mesh axis 1 twice", "one dim only"),
    "axis twice in a dim": (lambda: letters("S11", "R"), SpecError,
        "('S11', 'R')", "use mesh axis 1 twice", "one dim only"),
    # sharding.py
    "mesh a list": (lambda: ShardingSpec([0, 1], (Shard(0),)), SpecError,
        "mesh=[0, 1]", "not a Mesh", "write Mesh([[0, 1]"),
    "letters for other dims": (lambda: letters("S0"), SpecError,
        "('S0',) describes 1 dims", "shape=(8, 4) has 2", "one entry per dim"),
    "placement without a tuple": (lambda: replace(ROWS, placements=Shard(0)), SpecError,
        "placements=Shard(0)", "not a tuple", "write one per mesh axis"),
    "axis_order without a tuple": (lambda: replace(ROWS, axis_order=1), SpecError,
        "axis_order=1", "not a tuple", "list all of"),
    "shape of fractions": (lambda: replace(ROWS, shape=(1.5, 2)), SpecError,
        "shape=(1.5, 2)", "not a sequence of integers", "write (4096, 1024)"),
    "shape a word": (lambda: replace(ROWS, shape="12"), SpecError,
        "shape='12'", "not a sequence of integers", "write (4096, 1024)"),
    "holdings empty": (lambda: ShardingSpec.explicit({}, (8,)), SpecError,
        "holdings are empty", "at least one rank", "name at least"),
    "shape missing": (lambda: COLUMNS.holding(2), SpecError,
        "any[?] R S0", "has no shape", "write ShardingSpec(mesh, placements, shape="),
    "source shape missing": (lambda: move(source=replace(ROWS, shape=None)), SpecError,
        "float32[?]", "has no shape", "shape=...)"),
    "dtype missing": (lambda: move(source=replace(ROWS, dtype=None)), SpecError,
        "any[8, 4] S0 R", "has no dtype", "dtype=...)"),
    "placements too few": (lambda: on_grid(Shard(0)), SpecError,
        "1 placements (Shard(0),)", "(dp=2 tp=2: ranks 0-3) with 2 axes", "give one placement per mesh axis"),
    "placement a letter": (lambda: on_grid("S0", Replicate()), SpecError,
        "placement 'S0' of mesh axis 'dp'", "not one of tricomm's", "import them from tricomm"),
    "placement a class": (lambda: on_grid(Shard(0), Replicate), SpecError,
        "mesh axis 'tp'", "Shard, Replicate, Partial", "import them"),
    "reductions mixed": (lambda: on_grid(Partial("max"), Partial()), SpecError,
        "(Partial('max'), Partial('sum'))", "mix the reductions ['max', 'sum']", "use one op"),
    "axis order short": (lambda: on_grid(Shard(0), Shard(0), order=("tp",)), SpecError,
        "axis_order=('tp',)", "each of the 2 axes ('dp', 'tp') once", "list them all, first cut first"),
    "axis order twice": (lambda: on_grid(Shard(0), Shard(0), order=(0, "dp")), SpecError,
        "(0, 'dp')", "once", "list them all"),
    "shape a number": (lambda: replace(ROWS, shape=8), SpecError,
        "shape=8", "not a sequence of integers", "write (4096, 1024)"),
    "shape of None": (lambda: replace(ROWS, shape=(8, None)), SpecError,
        "shape=(8, None)", "sequence of integers", "write (4096"),
    "shape negative": (lambda: replace(ROWS, shape=(8, -4)), SpecError,
        "shape=(8, -4)", "negative extent", "at least 0"),
    "shard of a scalar": (lambda: replace(ROWS, shape=()), SpecError,
        "Shard(0)", "0-d tensor has no dim to cut", "use Replicate()"),
    "dim too large": (lambda: on_grid(Shard(2), Replicate()), SpecError,
        "Shard(2)", "out of range for shape (8, 4)", "use a dim from -2 to 1"),
    "dim too small": (lambda: on_grid(Shard(0), Shard(-3)), SpecError,
        "Shard(-3)", "out of range for shape (8, 4)", "use a dim from -2 to 1"),
    "segments of another sum": (lambda: on_grid(Shard(0, (4, 5)), Replicate()), SpecError,
        "Shard(0, segments=(4, 5))", "add up to 9, but dim 0 of shape (8, 4) is 8", "give segments that add up to 8"),
    "holding of other dims": (lambda: explicit((0, 4), dims=2), SpecError,
        "(((0, 4),), ((0, 4),)) of rank 5", "has 2 dims, but shape (8,) has 1", "give one tuple of (start, stop)"),
    "holding with a dim's brackets missing": (lambda: ShardingSpec.explicit({0: ((0, 4), (0, 16))}, (8, 16)), SpecError,
        "((0, 4), (0, 16)) of rank 0", "not one tuple of integer (start, stop) pairs per dim", "write (((0, 4)"),
    "holding of fractions": (lambda: explicit((0, 2.5)), SpecError,
        "(0, 2.5)", "not one tuple of integer", "write (((0, 4)"),
    "interval beyond the end": (lambda: explicit((4, 9)), SpecError,
        "(4, 9) of rank 5 in dim 0", "not lie in (0, 8)", "within the global shape"),
    "interval backwards": (lambda: explicit((4, 2)), SpecError,
        "interval (4, 2) of rank 5", "half-open", "within the global shape"),
    "intervals overlap": (lambda: explicit((4, 8), (0, 5)), SpecError,
        "((4, 8), (0, 5)) of rank 5", "overlap at 4", "holds an element once"),
    # topology.py
    "hosts a string": (lambda: Topology("ab"), SpecError,
        "hosts='ab'", "one host name per rank", 'write ("a", "a", "b", "b")'),
    "hosts numbers": (lambda: Topology((0, 1)), SpecError,
        "hosts=(0, 1)", "one host name per rank", 'write ("a", "a", "b", "b")'),
    "hosts empty": (lambda: Topology(()), SpecError,
        "hosts is empty", "one host name per rank", "give one"),
    "rate zero": (lambda: Topology(("a",), nic_bytes_per_second=0), SpecError,
        "nic_bytes_per_second=0", "must be", "above 0"),
    "rate no number": (lambda: Topology(("a",), intra_bytes_per_second=float("nan")), SpecError,
        "intra_bytes_per_second=nan", "must be", "above 0"),
    "rate of a host missing": (lambda: Topology(("a", "b"), {"a": 1e9}), SpecError,
        "{'a': 1000000000.0}", "no rate for host 'b'", "give one for every host"),
    "rates of a host three": (lambda: Topology(("a",), {"a": (1, 2, 3)}), SpecError,
        "(1, 2, 3) of host 'a'", "must be a rate or (sending, receiving)", "give two rates"),
    "nodes none": (lambda: Search(0), PlanError,
        "nodes=0", "at least 1", "leave it out"),
    "NICs negative": (lambda: Topology(("a",), nics_per_host=-1), SpecError,
        "nics_per_host=-1", "must be", "above 0"),
    "latency negative": (lambda: Topology(("a",), latency_seconds=-1.0), SpecError,
        "latency_seconds=-1.0", "must be", "at least 0"),
    "host missing": (lambda: move(topology=Topology(("a", "b", "c"))), SpecError,
        "rank 3 has no host", "topology names 3 hosts", "give one host name per rank"),
    "host missing in a bound": (lambda: move().lower_bound_seconds(Topology(("a",))), SpecError,
        "rank 3", "names 1 hosts", "per rank"),
    "host missing in a simulation": (lambda: move().simulated_seconds(Topology(("a",))), SpecError,
        "rank 3", "names 1 hosts", "per rank"),
    # plan/
    "another rank's program": (lambda: move(rank=2).for_rank(3), PlanError,
        "not for rank 3", "built for rank 2 only", "call make_plan without rank"),
    **{f"{name} of one rank": (lambda name=name: of_one_rank(name), PlanError,
        f"{name} needs the plan of all ranks", "built for rank 2", "call make_plan without rank")
        for name in ("wire_nbytes", "minimum_nbytes", "lower_bound_seconds", "simulated_seconds", "verify")},
    "another shape": (lambda: move(destination=replace(COLUMNS, shape=(4, 8))), SpecError,
        "(8, 4) and destination shape (4, 8)", "reshapes nothing", "leave the destination's shape out"),
    "destination Partial": (lambda: move(destination=replace(COLUMNS, placements=(Partial(),))), SpecError,
        "R R +sum(0) on (x=2: ranks 2-3)", "no one way to split a value", "reshard to Replicate() or Shard(dim)"),
    "source not a spec": (lambda: make_plan(None, ROWS), SpecError,
        "source=None", "not a ShardingSpec", "write ShardingSpec(mesh"),
    "strategy a word": (lambda: move(strategy="auto"), PlanError,
        "strategy='auto'", "not a strategy", "pass Auto()"),
    "strategy a class": (lambda: move(strategy=SendRecv), PlanError,
        "SendRecv", "not a strategy", "pass Auto()"),
    "balance a word": (lambda: move(balance="naive"), PlanError,
        "balance='naive'", "not a sender choice", "pass Split()"),
    "staging a truth": (lambda: move(staging_bytes=True), PlanError,
        "staging_bytes=True", "must be a positive", "such as 256 << 20"),
    "staging zero": (lambda: move(staging_bytes=0), PlanError,
        "staging_bytes=0", "must be a positive", "number of bytes"),
    "staging a float": (lambda: move(staging_bytes=1e6), PlanError,
        "staging_bytes=1000000.0", "must be a positive", "number of bytes"),
    "chunk zero": (lambda: SendRecv(0), PlanError,
        "chunk_bytes=0", "positive number of bytes", "or None to choose"),
    "chunk a float": (lambda: Broadcast(4e6), PlanError,
        "chunk_bytes=4000000.0", "positive number of bytes", "or None to choose"),
    "held by nobody": (nobody_holds, PlanError,
        "(((3, 4),),) that rank 2 needs", "held by no rank of the source int8[8] explicit", "add them"),
    # autograd.py
    "gradient of a maximum": (
        lambda: autograd.gradient_specs(replace(ROWS, placements=(Partial("max"),)), COLUMNS), SpecError,
        "Partial('max')", "has no gradient that its layout determines", "reduce it yourself"),
    # packing.py
    "dtype of another torch": (lambda: packing.torch_dtype("float31"), PlanError,
        "float31", f"this torch {torch.__version__} has no", "use a newer torch"),
    "staging too small": (lambda: run({}, staging_bytes=127, strategy=SendRecv(16)), PlanError,
        "rank 0 stages 128 bytes", "staging_bytes is 127", "raise staging_bytes or give the strategy a smaller"),
    "shard of a part": (lambda: local_shard(torch.zeros(8, 3), ROWS, 0), SpecError,
        "shape (8, 3)", "not the full tensor of float32[8, 4]", "pass all of it"),
    # tensors.py
    "tensor of numpy": (lambda: run({0: torch.zeros(4, 4), 1: torch.zeros(4, 4).numpy()}), SpecError,
        "the tensor of rank 1 is a ndarray", "a plain dense torch.Tensor is expected", "pass its local data"),
    "tensor on neither mesh": (lambda: run({9: torch.zeros(3)}), SpecError,
        "rank 9", "on neither mesh", "take it out"),
    "tensor off the mesh": (lambda: run({2: torch.zeros(3)}), SpecError,
        "rank 2 gave a tensor of shape (3,)", "not on the source mesh", "pass None"),
    "tensor missing": (lambda: run({1: None}), SpecError,
        "rank 1 is on the source mesh (x=2:", "gave no tensor", "pass its shard of shape (4, 4) and dtype float32"),
    "tensor sparse": (lambda: run({1: torch.zeros(4, 4).to_sparse()}), SpecError,
        "rank 1 is a Tensor", "plain dense", "pass its local data"),
    "tensor of a subclass": (lambda: run({0: torch.zeros(4, 4).as_subclass(Subclass)}), SpecError,
        "is a Subclass", "plain dense torch.Tensor", "tensor.to_local()"),
    "tensor of another shape": (lambda: run({1: torch.zeros(4, 3)}), SpecError,
        "rank 1 has shape (4, 3)", "gives it (4, 4)", "spec.local_shape(rank)"),
    "tensor of another dtype": (lambda: run({1: torch.zeros(4, 4).half()}), SpecError,
        "has dtype torch.float16", "its spec says", "pass tensor.to(torch.float32)"),
    "tensor elsewhere": (lambda: run({1: torch.zeros(4, 4, device="meta")}), SpecError,
        "rank 1 is on meta", "works on cpu", "move it with .to('cpu')"),
    "out off the mesh": (lambda: receive_into(torch.zeros(8, 2), 0), SpecError,
        "rank 0 gave out of shape (8, 2)", "not on the destination mesh", "pass None"),
    "out of another shape": (lambda: receive_into(torch.zeros(2, 8)), SpecError,
        "out of rank 2 has shape (2, 8)", "gives it (8, 2)", "pass the"),
    "out of another dtype": (lambda: receive_into(torch.zeros(8, 2).long()), SpecError,
        "out of rank 2 has dtype torch.int64", "its spec says", "change the spec"),
    "out conjugate": (lambda: receive_into(torch.zeros(8, 2, dtype=torch.complex64).conj().imag), SpecError,
        "out of rank 2", "lazy conjugate or negative", "pass a plain tensor"),
    "out with a gradient": (lambda: receive_into(torch.zeros(8, 2, requires_grad=True)), SpecError,
        "out of rank 2 requires grad", "in place", "torch.no_grad()"),
    "out expanded": (lambda: receive_into(torch.zeros(2).expand(8, 2)), SpecError,
        "strides (0, 1)", "share memory", "out.contiguous()"),
    "out overlapping itself": (lambda: receive_into(torch.zeros(64).as_strided((8, 2), (1, 1))), SpecError,
        "strides (1, 1)", "share memory", "out.contiguous()"),
    "out over the source": (receive_into_the_source, SpecError,
        "out of rank 2", "shares memory with its source", "leave out=None"),
    "cast that torch lacks": (impossible_cast, SpecError,
        "bits8 to float64", f"this torch {torch.__version__} cannot cast", "cast the tensor yourself"),
}
# fmt: on


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_value_the_rule_and_the_remedy(name: str) -> None:
    call, error, value, rule, remedy = REFUSALS[name]
    with pytest.raises(TricommError) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    assert value in text, text
    assert rule in text, text
    assert remedy in text, text


def raised_at(call: Callable[[], Any]) -> tuple[str, int]:
    """The file and line of the raise statement that ends a call."""
    with pytest.raises(TricommError) as caught:
        call()
    last = caught.traceback[-1]
    return str(last.path), last.lineno + 1


def test_every_raise_statement_has_a_case() -> None:
    reached = {raised_at(call) for call, *_ in REFUSALS.values()}
    for module in MODULES:
        path = str(Path(inspect.getfile(module)).resolve())
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.Raise):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                assert any((path, line) in reached for line in lines), f"{path}:{node.lineno} is raised by no case"


def test_errors_are_what_callers_would_catch() -> None:
    assert SpecError.__mro__[1:3] == (TricommError, ValueError)
    assert PlanError.__mro__[1:3] == (TricommError, ValueError)
    assert TransportError.__mro__[1:3] == (TricommError, RuntimeError)
    assert TricommError.__bases__ == (Exception,)
    assert len({SpecError, PlanError, TransportError, TricommError}) == 4
