"""Links by themselves: tensors cross, gradients come back, buffers are used in turn, and no wrong order hangs."""

import re
import time

import pytest
import torch

from tests.oracle import pick, require_equal, small_integers
from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.tensor import EdgeTensor

FIRST = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
SECOND = Mesh([4, 5, 6], ("tp",))
OVERLAPPING = Mesh([2, 3, 4, 5], ("tp",))
SHAPE = (12, 8)
MICROBATCHES = 4
TIMEOUT_SECONDS = 10.0


def full(name: int, microbatch: int, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return small_integers(shape, dtype, 10 * name + microbatch)


def two_ways(rank: int, second: Mesh, slots: int | None) -> int:
    """Two steps there and back of three tensors; how many different receive buffers the first tensor saw."""
    source = ShardingSpec(FIRST, (Shard(0), Shard(1)), SHAPE, "float32")
    tokens = ShardingSpec(FIRST, (Shard(0), Replicate()), SHAPE[:1], "int64")
    tensors = [
        EdgeTensor(source, ShardingSpec(second, (Replicate(),))),
        EdgeTensor(tokens, ShardingSpec(second, (Replicate(),)), gradient=None),
        EdgeTensor(source, ShardingSpec(second, (Shard(1),), dtype="bfloat16")),
    ]
    link = Link("two ways", tensors, microbatches=MICROBATCHES, slots=(slots, 2), timeout_seconds=TIMEOUT_SECONDS)
    if rank not in (*FIRST.ranks, *second.ranks):
        return 0
    link.connect()
    places = set()
    for _ in range(2):
        if rank in FIRST:
            for m in range(MICROBATCHES):
                parts = (full(0, m), full(1, m, "int64", SHAPE[:1]), full(2, m))
                specs = (source, tokens, source)
                link.send(tuple(pick(part, spec, rank) for part, spec in zip(parts, specs, strict=True)), m)
        if rank in second:
            for m in range(MICROBATCHES):
                handle = link.recv(m)
                received = handle.wait()
                for part, tensor, found in zip(
                    (full(0, m), full(1, m, "int64", SHAPE[:1]), full(2, m).bfloat16()), tensors, received, strict=True
                ):
                    require_equal(found, pick(part, tensor.destination, rank), f"microbatch {m} on rank {rank}")
                places.add(received[0].data_ptr())
                gradients = tuple(3 * received[i] for i in (0, 2))
                handle.release()
                link.send_gradient(gradients, m)
        if rank in FIRST:
            for m in range(MICROBATCHES):
                back = link.recv_gradient(m)
                for name, found in zip((0, 2), back.wait(), strict=True):
                    require_equal(found, pick(3 * full(name, m), source, rank), f"gradient {m} on rank {rank}")
                back.release()
        link.flush()
    return len(places)


@pytest.mark.parametrize("slots", [1, 3, None])
@pytest.mark.parametrize("second", [SECOND, OVERLAPPING], ids=["disjoint", "overlapping"])
def test_tensors_cross_and_gradients_come_back(ranks: Ranks, second: Mesh, slots: int | None) -> None:
    places = ranks.run(two_ways, second, slots)
    for rank in second.ranks:
        if slots is not None and rank not in FIRST:
            assert places[rank] == slots


def gradient_rules(rank: int, placements, gradient, weight: float) -> None:
    """Each taking rank computes its own multiple of the gradient."""
    source = ShardingSpec(Mesh([0, 1], ("x",)), placements, SHAPE, "float32")
    destination = ShardingSpec(Mesh([4, 5], ("tp",)), (Replicate(),))
    link = Link("rules", [EdgeTensor(source, destination, gradient)], microbatches=1, timeout_seconds=TIMEOUT_SECONDS)
    if rank in link.tensors[0].destination.mesh:
        link.connect()
        link.send_gradient((rank - 3.0) * full(0, 0), 0)
    elif rank in source.mesh:
        link.connect()
        found = link.recv_gradient(0).wait()
        expected = source if isinstance(placements[0], Shard) else ShardingSpec(source.mesh, (Replicate(),), SHAPE)
        require_equal(found, pick(weight * full(0, 0), expected, rank), f"rank {rank}")
    link.flush()


@pytest.mark.parametrize(
    ("placement", "gradient", "weight"),
    [
        (Shard(0), (Partial(),), 3.0),
        (Partial(), (Partial(),), 3.0),
        (Partial("avg"), (Partial(),), 1.5),
        (Shard(0), (), None),
    ],
)
def test_gradients_of_shares_are_summed_and_of_copies_one_is_taken(ranks: Ranks, placement, gradient, weight) -> None:
    if weight is not None:
        ranks.run(gradient_rules, (placement,), gradient, weight)
        return
    # Copies are said to be equal: whose is taken is the planner's choice, so either will do, and never their sum.
    ranks.run(one_of_two_copies)


def one_of_two_copies(rank: int) -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), SHAPE, "float32")
    tensor = EdgeTensor(source, ShardingSpec(Mesh([4, 5], ("tp",)), (Replicate(),)))
    link = Link("copies", [tensor], microbatches=1, timeout_seconds=TIMEOUT_SECONDS)
    if rank in (4, 5):
        link.connect()
        link.send_gradient(torch.full(SHAPE, float(rank)), 0).wait()
    elif rank in (0, 1):
        link.connect()
        assert set(link.recv_gradient(0).wait().flatten().tolist()) <= {4.0, 5.0}


def order_of_ones_own(rank: int) -> None:
    """Any order that both ends agree on, another in each direction."""
    link = simple_link("own order", orders=((2, 0, 1, 3), (3, 2, 1, 0)))
    if rank == 0:
        link.connect()
        for m in (2, 0, 1, 3):
            link.send(torch.full(SHAPE, float(m)), m)
        for m in (3, 2, 1, 0):
            assert link.recv_gradient(m).wait()[0, 0] == 10 * m
    elif rank == 1:
        link.connect()
        received = {m: link.recv(m) for m in (2, 0, 1, 3)}
        for m in (3, 2, 1, 0):
            link.send_gradient(10 * received[m].wait(), m)
        link.flush()


def simple_link(name: str, **arguments) -> Link:
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), SHAPE, "float32")
    tensor = EdgeTensor(source, ShardingSpec(Mesh([1], ("x",)), (Replicate(),)))
    return Link(name, [tensor], microbatches=MICROBATCHES, timeout_seconds=TIMEOUT_SECONDS, **arguments)


def test_microbatches_cross_in_any_order_that_was_said(ranks: Ranks) -> None:
    ranks.run(order_of_ones_own)


def misuse(rank: int, how: str) -> tuple[str, str, float]:
    """(kind of error, its text, seconds) on this rank; the group works afterwards."""
    link = simple_link(f"misuse {how}", slots=(2, None))
    outcome = ("nothing", "", 0.0)
    if rank in (0, 1):
        link.connect()
        began = time.monotonic()
        try:
            MISUSES[how](rank, link)
        except (SpecError, TransportError) as error:
            outcome = (type(error).__name__, str(error), time.monotonic() - began)
    return outcome


def wrong_order(rank: int, link: Link) -> None:
    if rank == 0:
        link.send(torch.zeros(SHAPE), 0)
        link.send(torch.zeros(SHAPE), 2)
    link.recv(0).wait()
    link.recv(1).wait()


def wrong_receive(rank: int, link: Link) -> None:
    if rank == 1:
        link.recv(1)
    link.recv_gradient(0).wait()


def ring_overrun(rank: int, link: Link) -> None:
    if rank == 1:
        for m in range(3):
            link.recv(m)
    link.recv_gradient(0).wait()


def wrong_side(rank: int, link: Link) -> None:
    if rank == 1:
        link.send(torch.zeros(SHAPE), 0)
    link.recv_gradient(0).wait()


def wrong_shape(rank: int, link: Link) -> None:
    if rank == 0:
        link.send(torch.zeros(3), 0)
    link.recv(0).wait()


MISUSES = {
    "order": wrong_order,
    "receive": wrong_receive,
    "ring": ring_overrun,
    "side": wrong_side,
    "shape": wrong_shape,
}


@pytest.mark.parametrize(
    ("how", "culprit", "text"),
    [
        ("order", 0, "send of microbatch 2 on edge misuse order forward, where it is the turn of microbatch 1"),
        ("receive", 1, "recv of microbatch 1 on edge misuse receive forward, where it is the turn of microbatch 0"),
        ("ring", 1, "has 2 receive buffers, and microbatch 2 needs the one that microbatch 0 still holds; release it"),
        ("side", 1, "rank 1 is not on the source mesh of edge misuse side forward and cannot send"),
        ("shape", 0, r"the tensor of rank 0 has shape \(3,\), and its spec gives it \(12, 8\)"),
    ],
)
def test_misuse_is_an_error_on_both_ends_at_once(ranks: Ranks, how: str, culprit: int, text: str) -> None:
    outcomes = ranks.run(misuse, how)
    for rank in (0, 1):
        kind, found, seconds = outcomes[rank]
        assert kind == ("SpecError" if rank == culprit else "TransportError")
        assert re.search(text, found), found
        assert rank == culprit or found.startswith(f"rank {culprit} refused the call: SpecError: ")
        assert seconds < TIMEOUT_SECONDS / 2


def disagreement(rank: int) -> str:
    if rank not in (0, 1):
        return ""
    link = simple_link("disagreement", orders=((0, 1, 2, 3), (0, 1, 2, 3) if rank else (3, 2, 1, 0)))
    with pytest.raises(TransportError, match="rank 1 disagrees with rank 0 about orders") as caught:
        link.connect()
    return str(caught.value)


def test_ends_that_disagree_do_not_connect(ranks: Ranks) -> None:
    assert ranks.run(disagreement)[0]


SOURCE = ShardingSpec(FIRST, (Shard(0), Replicate()), SHAPE, "float32")
DESTINATION = ShardingSpec(SECOND, (Shard(1),))


def test_what_an_edge_tensor_must_say() -> None:
    with pytest.raises(SpecError, match=r"gradient=\(Shard\(0\),\) cuts axis 'tp' by Shard\(0\), where the tensor has"):
        EdgeTensor(SOURCE, DESTINATION, (Shard(0),))
    with pytest.raises(SpecError, match=r"2 placements .* give one placement per mesh axis"):
        EdgeTensor(SOURCE, DESTINATION, (Shard(1), Partial()))
    with pytest.raises(SpecError, match="must have its sizes in one place"):
        EdgeTensor(SOURCE, DESTINATION, shape=(12, "width"))
    with pytest.raises(SpecError, match="must have its sizes in one place"):
        EdgeTensor(ShardingSpec(FIRST, (Shard(0), Replicate())), DESTINATION)
    changing = EdgeTensor(ShardingSpec(FIRST, (Shard(0), Replicate()), None, "float32"), DESTINATION, shape=(12, "n"))
    assert changing.names == ("n",)
    assert changing.bound({"n": 8}).source == SOURCE
    with pytest.raises(SpecError, match=r"shape=\(12, 'n'\) has no size for 'n'; the known sizes are {'m': 1}"):
        changing.bound({"m": 1})


def test_what_a_link_must_be_told() -> None:
    tensor = EdgeTensor(SOURCE, DESTINATION)
    with pytest.raises(SpecError, match="edge 'a' carries no tensor; give at least one EdgeTensor"):
        Link("a", [], microbatches=1)
    with pytest.raises(SpecError, match="microbatches=0 of edge 'a' must be from 1 to"):
        Link("a", [tensor], microbatches=0)
    with pytest.raises(SpecError, match=r"slots=\(0, None\) of edge 'a' must be at least 1, or None"):
        Link("a", [tensor], microbatches=1, slots=(0, None))
    with pytest.raises(SpecError, match=r"order \(0, 0\) of edge 'a' must name each of 2 microbatches once"):
        Link("a", [tensor], microbatches=2, orders=((0, 0), (0, 1)))
    other = EdgeTensor(SOURCE, ShardingSpec(OVERLAPPING, (Shard(1),)))
    with pytest.raises(SpecError, match=r"the tensors of edge 'a' have destination meshes .* make another edge"):
        Link("a", [tensor, other], microbatches=1)


def with_autograd(rank: int) -> None:
    """As the module's docstring has it: two layers on two ranks, and autograd on both sides."""
    if rank > 1:
        return
    first, second = (ShardingSpec(Mesh([at], ("x",)), (Replicate(),), SHAPE, "float32") for at in (0, 1))
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    layers = [torch.nn.Linear(SHAPE[1], SHAPE[1]) for _ in range(2)]
    with Link("autograd", [EdgeTensor(first, second)], microbatches=1, timeout_seconds=TIMEOUT_SECONDS) as link:
        link.connect()
        if rank == 0:
            y = layers[0](x)
            link.send(y, 0)
            y.backward(link.recv_gradient(0).wait())
        else:
            y = link.recv(0).wait().requires_grad_()
            layers[1](y).sum().backward()
            link.send_gradient(y.grad, 0)
        link.flush()
    found = layers[rank].weight.grad
    whole = [torch.nn.Linear(SHAPE[1], SHAPE[1]) for _ in range(2)]
    for mine, theirs in zip(whole, layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    whole[1](whole[0](x)).sum().backward()
    require_equal(found, whole[rank].weight.grad, f"rank {rank}")


def test_autograd_on_both_sides(ranks: Ranks) -> None:
    ranks.run(with_autograd)
