"""Plans, options and tensors that are refused."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from tests.refusals.common import COLUMNS, OTHERS, ROWS, Refusal, move, run
from tricomm import (
    ArgumentError,
    Auto,
    Broadcast,
    LocalTransport,
    Options,
    Partial,
    Plan,
    PlanError,
    SendRecv,
    Shard,
    ShardingSpec,
    SpecError,
    local_shard,
    make_plan,
)
from tricomm.autograd import layouts as autograd
from tricomm.options import LinkOptions
from tricomm.packing import copy_program, tensor_checker
from tricomm.plan import arguments


def receive_into(out: torch.Tensor, rank: int = 2, source: torch.Tensor | None = None) -> torch.Tensor | None:
    sources = [] if source is None else [source]
    (item,) = move().items
    return tensor_checker.ItemChecker(item.source, item.destination, rank, torch.device("cpu")).check_out(
        "out", out, sources
    )


def without_memory(shape: tuple[int, ...] = (4, 4), left_nbytes: int = 0) -> torch.Tensor:
    """As parameters are between uses under FSDP."""
    tensor = torch.zeros(shape)
    tensor.untyped_storage().resize_(left_nbytes)
    return tensor


def receive_into_the_source() -> torch.Tensor | None:
    buffer = torch.zeros(32)
    return receive_into(buffer[15:31].view(8, 2), 2, buffer[:16].view(4, 4))


def impossible_cast() -> None:
    """Torch has every cast that tricomm allows, so the plan is one that make_plan would refuse."""
    cast = move(destination=replace(COLUMNS, dtype="float64"))
    (one,) = cast.classes
    tensor_checker.check_casts(replace(cast, classes=(replace(one, source=replace(one.source, dtype="bits8")),)))


def nobody_holds() -> Plan:
    source = ShardingSpec.explicit({0: (((0, 3), (5, 8)),)}, (8,), "int8")
    return make_plan(source, ShardingSpec(OTHERS, (Shard(0),)))


def of_one_rank(name: str) -> Any:
    """A question that only the plan of all ranks can answer."""
    answer = getattr(move(rank=2), name)
    return answer() if callable(answer) else answer


class Subclass(torch.Tensor):
    pass


class Unhashable(SendRecv):
    __hash__ = None


def options(**given: Any) -> Options:
    return Options.of(given, "reshard")


# fmt: off
REFUSALS: dict[str, Refusal] = {
    # plan/
    "another rank's program": (lambda: move(rank=2).for_rank(3), PlanError,
        "not for rank 3", "built for rank 2 only", "call make_plan without rank"),
    **{f"{name} of one rank": (lambda name=name: of_one_rank(name), PlanError,
        f"{name} needs the plan of all ranks", "built for rank 2", "call make_plan without rank")
        for name in ("wire_nbytes", "minimum_nbytes", "lower_bound_seconds", "simulated_seconds", "verify")},
    "another shape": (lambda: move(destination=replace(COLUMNS, shape=(4, 8))), SpecError,
        "(8, 4) and destination shape (4, 8)", "reshapes nothing", "leave the destination's shape out"),
    "destination Partial": (lambda: move(destination=replace(COLUMNS, placements=(Partial(),))), SpecError,
        "float32[8, 4] sum over x on (x=2: ranks 2-3)", "no one way to split a value",
        "reshard to Replicate() or Shard(dim)"),
    "options without names": (lambda: Options(3), ArgumentError,
        "Options(3)", "options are named", "write name=value"),
    "cache no folder": (lambda: Auto(cache=3), ArgumentError,
        "cache=3", "path of a folder", "or None to keep nothing"),
    "rank off the meshes": (lambda: move(rank=7), SpecError,
        "rank=7", "on neither mesh", "pass one of 0-3"),
    "program of no rank": (lambda: move().for_rank(-1), PlanError,
        "rank=-1", "must be at least 0", "give a rank"),
    "resolved by no spec": (lambda: ROWS.resolved("float32"), ArgumentError,  # type: ignore[arg-type]
        "source='float32'", "not a ShardingSpec", "pass the layout"),
    "axes of no dim": (lambda: ROWS.cutting_axes(2), SpecError,
        "dim=2", "is no dim of", "from 0 to 1"),
    "axes of what is no dim": (lambda: ROWS.cutting_axes("rows"), ArgumentError,  # type: ignore[arg-type]
        "dim='rows'", "not an integer", "name one tensor dim"),
    "source not a spec": (lambda: make_plan(None, ROWS), ArgumentError,
        "source=None", "not a ShardingSpec", "write ShardingSpec(mesh"),
    "mesh outside of the group": (lambda: arguments.check_ranks("source", ROWS.mesh, 1), SpecError,
        "rank 1 of the source mesh (x=2: ranks 0-1)", "outside of the process group", "use ranks of the group"),
    "strategy a word": (lambda: move(strategy="auto"), ArgumentError,
        "strategy='auto'", "not a strategy", "pass Auto()"),
    "topology a number": (lambda: move(topology=2), ArgumentError,
        "topology=2", "not a Topology", "write Topology(hosts)"),
    "rank a word": (lambda: move(rank="0"), ArgumentError,
        "rank='0'", "not a rank", "pass an integer"),
    "strategy without a hash": (lambda: move(strategy=Unhashable()), ArgumentError,
        "Unhashable", "not a strategy", "pass Auto()"),
    "strategy a class": (lambda: move(strategy=SendRecv), ArgumentError,
        "SendRecv", "not a strategy", "pass Auto()"),
    "balance a word": (lambda: move(balance="naive"), ArgumentError,
        "balance='naive'", "not a sender policy", "pass Split()"),
    "staging a truth": (lambda: move(staging_bytes=True), ArgumentError,
        "staging_bytes=True", "must be a number of bytes", "such as 256 << 20"),
    "staging zero": (lambda: move(staging_bytes=0), PlanError,
        "staging_bytes=0", "must be a positive", "number of bytes"),
    "staging a float": (lambda: move(staging_bytes=1e6), ArgumentError,
        "staging_bytes=1000000.0", "must be a number of bytes", "an integer"),
    "search of less than none": (lambda: Auto(search_up_to=-1), PlanError,
        "search_up_to=-1", "must be a number of ranks, 0 or more", "such as 32"),
    "chunk zero": (lambda: SendRecv(0), PlanError,
        "chunk_bytes=0", "positive number of bytes", "or None to choose"),
    "chunk a float": (lambda: Broadcast(4e6), ArgumentError,
        "chunk_bytes=4000000.0", "positive number of bytes", "or None to choose"),
    "one call a number": (lambda: Broadcast(one_call=1), ArgumentError,
        "one_call=1", "must be True or False", "leave it out for a chain"),
    "held by nobody": (nobody_holds, PlanError,
        "(((3, 4),),) that rank 2 needs", "held by no rank of the source int8[8] explicit", "add them"),
    # options.py
    "option misspelt": (lambda: options(straegy=SendRecv()), ArgumentError,
        "no option 'straegy'", "reshard has", "write strategy=..."),
    "option unknown": (lambda: options(zzz=1), ArgumentError,
        "no option 'zzz'", "reshard has", "its options are strategy, balance, "),
    "option that a Link chooses": (lambda: Options.of({"channel": "a"}, "Link", LinkOptions), ArgumentError,
        "no option 'channel'", "Link has", "its options are"),
    "timeout without a unit": (lambda: options(timeout=3), ArgumentError,
        "timeout=3", "has no unit", "write timeout_seconds=3"),
    "timeout twice": (lambda: options(timeout=timedelta(1), timeout_seconds=3), ArgumentError,
        "timeout_seconds=3", "twice", "leave one out"),
    "timeout a word": (lambda: options(timeout_seconds="3"), ArgumentError,
        "timeout_seconds='3'", "must be a number of seconds", "leave it out for 300"),
    "timeout zero": (lambda: options(timeout_seconds=0), SpecError,
        "timeout_seconds=0", "above 0", "give a time"),
    "timeout no number": (lambda: options(timeout_seconds=float("nan")), SpecError,
        "timeout_seconds=nan", "above 0", "give a time"),
    "timeout for ever": (lambda: options(timeout_seconds=float("inf")), SpecError,
        "timeout_seconds=inf", "at most 1e+09", "give a time"),
    "checksum a word": (lambda: options(checksum="yes"), ArgumentError,
        "checksum='yes'", "no truth value", "pass True or False"),
    "hooks a mapping": (lambda: options(hooks={"layers.0": print}), ArgumentError,
        "hooks={'layers.0'", "must be Hooks", "write Hooks("),
    "confirm a word": (lambda: options(confirm="yes"), ArgumentError,
        "confirm='yes'", "no truth value", "pass True"),
    "channel no text": (lambda: options(channel="a\udc80"), SpecError,
        "channel='a\\udc80'", "half of a surrogate pair", "write another"),
    "channel a number": (lambda: options(channel=3), ArgumentError,
        "channel=3", "must be a string", "leave it out"),
    "name a number": (lambda: options(name=3), ArgumentError,
        "name=3", "must be a string", "leave it out"),
    "transport unknown": (lambda: options(transport="tcp"), SpecError,
        "transport='tcp'", "is none of auto", "write one of them"),
    "progress no function": (lambda: options(progress=3), ArgumentError,
        "progress=3", "cannot be called", "pass a function of one Progress"),
    "progress of nothing": (lambda: options(progress=lambda: None), ArgumentError,
        "progress=<function", "cannot be called with one Progress (too many positional arguments)", "pass a function"),
    "progress of two": (lambda: options(progress=lambda done, of: None), ArgumentError,
        "progress=<function", "cannot be called with one Progress (missing a required argument: 'of')", "of one"),
    "device a number": (lambda: options(device=0.5), ArgumentError,
        "device=0.5", "not a device", 'write "cpu"'),
    "device unknown": (lambda: options(device="gpu"), SpecError,
        "device='gpu'", "not a device of torch", 'write "cpu"'),
    # autograd.py
    "gradient of a maximum": (
        lambda: autograd.gradient_specs(replace(ROWS, placements=(Partial("max"),)), COLUMNS), SpecError,
        "Partial('max')", "has no gradient that its layout determines", "reduce it yourself"),
    "gradient of two slots": (
        lambda: autograd.gradient_specs(ROWS, ShardingSpec.explicit({3: (((0, 2), (1, 4)),)}, (8,))), SpecError,
        "rank 3 of the destination holds (((0, 2), (1, 4)),)", "an element in two slots", "move a detached tensor"),
    # copy_program.py
    "dtype of another torch": (lambda: copy_program.torch_dtype("float31"), PlanError,
        "float31", f"this torch {torch.__version__} has no", "use a newer torch"),
    "staging too small": (lambda: run({}, staging_bytes=127, strategy=SendRecv(16)), PlanError,
        "rank 0 stages 128 bytes", "staging_bytes is 127", "raise staging_bytes or give the strategy a smaller"),
    "shard of a list": (lambda: local_shard([1.0], ROWS, 0), ArgumentError,
        "tensor=[1.0]", "not a torch.Tensor", "pass the full tensor of"),
    "shard of a part": (lambda: local_shard(torch.zeros(8, 3), ROWS, 0), SpecError,
        "shape (8, 3)", "not the full tensor of float32[8/x, 4]", "pass all of it"),
    # tensors.py
    "run of no plan": (lambda: LocalTransport().run(ROWS, {}), ArgumentError,
        "plan=ShardingSpec(", "not a Plan", "pass what make_plan gave"),
    "run with a list": (lambda: LocalTransport().run(move(), [torch.zeros(4, 4)]), ArgumentError,
        "tensors=[tensor(", "not a mapping", "write {rank: shard}"),
    "tensor of numpy": (lambda: run({0: torch.zeros(4, 4), 1: torch.zeros(4, 4).numpy()}), ArgumentError,
        "the tensor of rank 1 is a ndarray", "a plain dense torch.Tensor is expected", "pass torch.as_tensor(...)"),
    "tensor on neither mesh": (lambda: run({9: torch.zeros(3)}), SpecError,
        "rank 9", "on neither mesh", "take it out"),
    "tensor off the mesh": (lambda: run({2: torch.zeros(3)}), SpecError,
        "rank 2 gave a tensor of shape (3,)", "not on the source mesh", "pass None"),
    "tensor missing": (lambda: run({1: None}), SpecError,
        "rank 1 is on the source mesh (x=2:", "gave no tensor", "pass its shard of shape (4, 4) and dtype float32"),
    "tensor under a transform": (
        lambda: torch.vmap(lambda x: run({0: x}))(torch.zeros(2, 4, 4)), SpecError,
        "inside of a torch.func transform", "tensors have no memory of their own", "call it outside"),
    "tensor sparse": (lambda: run({1: torch.zeros(4, 4).to_sparse()}), ArgumentError,
        "rank 1 is a Tensor that is of layout", "plain dense", "pass tensor.to_dense()"),
    "tensor of a subclass": (lambda: run({0: torch.zeros(4, 4).as_subclass(Subclass)}), ArgumentError,
        "is a Subclass", "plain dense torch.Tensor", "tensor.as_subclass(torch.Tensor)"),
    "tensor of another shape": (lambda: run({1: torch.zeros(4, 3)}), SpecError,
        "rank 1 has shape (4, 3)", "gives it (4, 4)", "spec.local_shape(rank)"),
    "tensor of another dtype": (lambda: run({1: torch.zeros(4, 4).half()}), SpecError,
        "has dtype torch.float16", "its spec says", "pass tensor.to(torch.float32)"),
    "tensor elsewhere": (lambda: run({1: torch.zeros(4, 4, device="meta")}), SpecError,
        "rank 1 is on meta", "works on cpu", "pass one that was made on 'cpu'"),
    "tensor without memory": (lambda: run({1: without_memory()}), SpecError,
        "rank 1 has shape (4, 4) and no memory for it", "its storage has 0 bytes", "pass another tensor"),
    "out without memory": (lambda: receive_into(without_memory((8, 2))), SpecError,
        "out of rank 2 has shape (8, 2) and no memory for it", "its storage has 0 bytes", "leave out=None"),
    "tensor of a smaller storage": (lambda: run({1: without_memory(left_nbytes=32)}), SpecError,
        "rank 1 has shape (4, 4) and no memory for it", "its storage has 32 bytes", "give it its memory back"),
    "out off the mesh": (lambda: receive_into(torch.zeros(8, 2), 0), SpecError,
        "rank 0 gave out of shape (8, 2)", "not on the destination mesh", "pass None"),
    "out of another shape": (lambda: receive_into(torch.zeros(2, 8)), SpecError,
        "out of rank 2 has shape (2, 8)", "gives it (8, 2)", "pass one made by torch.empty"),
    "out of another dtype": (lambda: receive_into(torch.zeros(8, 2).long()), SpecError,
        "out of rank 2 has dtype torch.int64", "its spec says", "change the destination's dtype"),
    "out conjugate": (lambda: receive_into(torch.zeros(8, 2, dtype=torch.complex64).conj().imag), SpecError,
        "out of rank 2", "lazy conjugate or negative", "pass a plain tensor"),
    "out with a gradient": (lambda: receive_into(torch.zeros(8, 2, requires_grad=True)), SpecError,
        "out of rank 2 requires grad", "in place", "torch.no_grad()"),
    "out expanded": (lambda: receive_into(torch.zeros(2).expand(8, 2)), SpecError,
        "strides (0, 1)", "share memory", "leave out=None"),
    "out overlapping itself": (lambda: receive_into(torch.zeros(64).as_strided((8, 2), (1, 1))), SpecError,
        "strides (1, 1)", "share memory", "leave out=None"),
    "out over the source": (receive_into_the_source, SpecError,
        "out of rank 2", "shares memory with its source", "leave out=None"),
    "cast that torch lacks": (impossible_cast, SpecError,
        "bits8 to float64", f"this torch {torch.__version__} cannot cast", "cast the tensor yourself"),
}
# fmt: on
