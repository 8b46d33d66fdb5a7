"""Calls with the tensors of the one before: they look at what may have changed alone, and promise all the same."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.oracle import pick, require_equal
from tricomm import Mesh, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.resharder.repeat import Repeat
from tricomm.transport.communicator import Communicator
from tricomm.transport.moving.kept import Unchanged
from tricomm.transport.tally import MOST_NOTED

SHAPE = (8, 12)
SIZE = 4
SOURCE = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), SHAPE, "float32")
COLUMNS = ShardingSpec(Mesh([2, 3], ("x",)), (Shard(1),), SHAPE, "float32")
ROWS_OF_ALL = ShardingSpec(Mesh([0, 1, 2, 3], ("x",)), (Shard(0),), SHAPE, "float32")
COLUMNS_OF_ALL = ShardingSpec(Mesh([0, 1, 2, 3], ("x",)), (Shard(1),), SHAPE, "float32")
BEFORE = 3
"""Calls until one is a repeat, which the third is: one binds, one finds that."""


def full(salt: int) -> torch.Tensor:
    return torch.arange(96, dtype=torch.float32).reshape(SHAPE) + 1000 * salt


def counting(bed: Any, make: Callable[..., bool]) -> Callable[..., bool]:
    """``Repeat.make`` that adds to a bed's ``repeats``."""

    def counted(repeat: Repeat, tensor: Any, out: Any) -> bool:
        made = make(repeat, tensor, out)
        bed.repeats += made
        return made

    return counted


class Bed:
    """A Resharder on one rank that has been called with the same tensors, and what its calls were.

    Attributes:
        repeats: calls that were repeats.
    """

    def __init__(
        self, rank: int, source: ShardingSpec = SOURCE, destination: ShardingSpec = COLUMNS, **options: Any
    ) -> None:
        options = {"transport": "network", "timeout_seconds": 20, **options}
        self.rank, self.source, self.destination = rank, source, destination
        self.mover = Resharder(source, destination, **options)
        self.shard = pick(full(0), source, rank) if rank in source.mesh else None
        self.out = torch.zeros(destination.local_shape(rank)) if rank in destination.mesh else None
        self.repeats = self.salt = 0
        for _ in range(BEFORE):
            self.call()

    def call(self, call: Callable[[], Any] | None = None) -> None:
        """Call with new numbers, and compare."""
        self.salt += 1
        if self.shard is not None:
            self.shard.copy_(pick(full(self.salt), self.source, self.rank))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Repeat, "make", counting(self, Repeat.make))
            moved = self.mover(self.shard, out=self.out) if call is None else call()
        if self.rank in self.destination.mesh:
            require_equal(moved, pick(full(self.salt), self.destination, self.rank), f"rank {self.rank}")
        else:
            assert moved is None


def repeated(rank: int, source: ShardingSpec, destination: ShardingSpec, options: dict[str, Any]) -> None:
    if rank >= SIZE:
        return
    bed = Bed(rank, source, destination, **options)
    before = bed.mover.stats
    version = None if bed.out is None else bed.out._version
    for _ in range(5):
        bed.call()
    after = bed.mover.stats
    assert bed.repeats == 1 + 5
    assert after.calls == before.calls + 5
    assert (after.messages - before.messages) * before.calls == 5 * before.messages
    assert (after.nbytes - before.nbytes) * before.calls == 5 * before.nbytes
    if bed.out is not None and version is not None:
        assert bed.out._version >= version + 5
    bed.mover.close()
    with pytest.raises(SpecError, match="closed"):
        bed.mover(bed.shard, out=bed.out)


@pytest.mark.parametrize(
    "options",
    [{}, {"confirm": True}, {"transport": "memory"}, {"transport": "memory", "confirm": True}],
    ids=lambda options: " ".join(map(str, options.values())) or "plain",
)
@pytest.mark.parametrize("is_of_all", [False, True])
def test_a_repeat_moves_and_counts_what_a_call_does(ranks: Ranks, is_of_all: bool, options: dict[str, Any]) -> None:
    source, destination = (ROWS_OF_ALL, COLUMNS_OF_ALL) if is_of_all else (SOURCE, COLUMNS)
    ranks.run(repeated, source, destination, options)


def changed(rank: int) -> None:
    """Each change leaves the next call to the ordinary way, which is right, or refuses on every rank."""
    if rank >= SIZE:
        return
    bed = Bed(rank)
    mover, repeats = bed.mover, bed.repeats
    if bed.shard is not None:
        bed.shard.data = torch.zeros(4, 12)
    if bed.out is not None:
        bed.out.data = torch.zeros(8, 6)
    bed.call()
    if bed.shard is not None:
        bed.shard.data = torch.zeros(12, 4).T
    if bed.out is not None:
        bed.out.data = torch.zeros(6, 8).T
    bed.call()
    bed.call(lambda: mover(bed.shard))
    bed.call(lambda: mover.start(bed.shard, out=bed.out).wait())
    assert bed.repeats == repeats
    for _ in range(BEFORE):
        bed.call()
    assert bed.repeats > repeats, "what was started is over"


def test_what_may_have_changed_is_looked_at(ranks: Ranks) -> None:
    ranks.run(changed)


def wrong_dtype(bed: Bed) -> str:
    tensor = bed.shard if bed.shard is not None else bed.out
    assert tensor is not None
    tensor.data = tensor.view(torch.int32)
    return "dtype"


def wrong_shape(bed: Bed) -> str:
    tensor = bed.shard if bed.shard is not None else bed.out
    assert tensor is not None
    tensor.data = tensor.view(-1)
    return "shape"


def lazy_negative(bed: Bed) -> str:
    assert bed.out is not None
    bed.out.data = torch._neg_view(bed.out)
    return "negative"


def requiring(bed: Bed) -> str:
    assert bed.out is not None
    bed.out.requires_grad_()
    return "requires grad"


def refused(rank: int, change: Callable[[Bed], str], culprit: int) -> str | None:
    if rank >= SIZE:
        return None
    bed = Bed(rank, confirm=True)
    repeats = bed.repeats
    words = change(bed) if rank == culprit else ""
    with pytest.raises((SpecError, TransportError)) as caught:
        bed.mover(bed.shard, out=bed.out)
    assert words in str(caught.value)
    assert f"rank {culprit}" in str(caught.value)
    assert bed.repeats == repeats
    return type(caught.value).__name__


@pytest.mark.parametrize(
    ("change", "culprit"),
    [(wrong_dtype, 1), (wrong_dtype, 3), (wrong_shape, 0), (wrong_shape, 2), (lazy_negative, 2), (requiring, 3)],
)
def test_a_tensor_that_fits_no_more_is_refused_before_anything_is_sent(
    ranks: Ranks, change: Callable[[Bed], str], culprit: int
) -> None:
    names = ranks.run(refused, change, culprit)[:SIZE]
    assert names == ["SpecError" if rank == culprit else "TransportError" for rank in range(SIZE)]


def transformed(rank: int) -> None:
    if rank >= SIZE:
        return
    bed = Bed(rank, confirm=True)

    def call(row: torch.Tensor) -> torch.Tensor:
        bed.mover(bed.shard, out=bed.out)
        return row

    with pytest.raises((SpecError, TransportError), match=r"torch\.func transform"):
        (torch.func.vmap(call) if rank == 0 else call)(torch.zeros(3))


def test_a_transform_is_refused(ranks: Ranks) -> None:
    ranks.run(transformed)


def staging_grows(rank: int) -> None:
    if rank >= SIZE:
        return
    bed = Bed(rank)
    wide = [ShardingSpec(one.mesh, one.placements, (80, 120), "float32") for one in (SOURCE, COLUMNS)]
    other = Resharder(*wide, transport="network", timeout_seconds=20)
    moved = other(pick(torch.ones(80, 120), wide[0], rank) if rank in SOURCE.mesh else None)
    assert moved is None or bool((moved == 1).all())
    for _ in range(BEFORE):
        bed.call()
    binding = bed.mover._execution.kept.bindings[0]
    assert not binding.staging_nbytes or binding.staging is bed.mover._session.channel.staged


def test_a_buffer_that_was_outgrown_is_let_go(ranks: Ranks) -> None:
    ranks.run(staging_grows)


def fails_then_works(rank: int, culprit: int, where: str, transport: str) -> str | None:
    if rank >= SIZE:
        return None
    bed = Bed(rank, ROWS_OF_ALL, COLUMNS_OF_ALL, transport=transport)
    with pytest.MonkeyPatch.context() as patch:
        if rank == culprit:
            patch.setattr(Communicator, "begin", broken(where))
        with pytest.raises((TransportError, RuntimeError, KeyError)) as caught:
            bed.mover(bed.shard, out=bed.out)
    for _ in range(BEFORE + 1):
        bed.call()
    assert bed.repeats > 1
    return str(caught.value)


def broken(where: str) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise (KeyError if where == "key" else RuntimeError)(f"no {where} here")

    return fail


@pytest.mark.parametrize("transport", ["network", "memory"])
@pytest.mark.parametrize("where", ["key", "runtime"])
def test_a_repeat_that_fails_is_told_to_all_and_the_next_call_works(ranks: Ranks, where: str, transport: str) -> None:
    texts = ranks.run(fails_then_works, 1, where, transport)[:SIZE]
    for rank, text in enumerate(texts):
        assert f"no {where} here" in text
        assert rank == 1 or "rank 1 failed" in text


def lost(rank: int) -> str | None:
    """On rank 2 a message cannot be started."""
    if rank >= SIZE:
        return None
    bed = Bed(rank, ROWS_OF_ALL, COLUMNS_OF_ALL, name="weights", confirm=True)
    if rank == 2:
        repeat = bed.mover._execution.kept.repeat
        starts = repeat._prepared.starts

        def fail(tag: int) -> None:
            assert tag == bed.mover._session.tag
            raise RuntimeError("connection closed by peer")

        repeat._prepared = repeat._prepared._replace(starts=(*starts[:-1], (*starts[-1][:1], fail, starts[-1][2])))
    with pytest.raises(TransportError) as caught:
        bed.mover(bed.shard, out=bed.out)
    return str(caught.value)


def test_a_message_that_cannot_be_started_is_a_lost_connection(ranks: Ranks) -> None:
    texts = ranks.run(lost)[:SIZE]
    assert all("connection to rank 2 closed in call 4 of Resharder 'weights'" in text for text in texts), texts


def let_go(rank: int) -> None:
    """A Resharder that repeats goes with its last reference, its connections too, and keeps no tensor."""
    if rank >= SIZE:
        return
    gc.collect()
    gc.disable()
    try:
        bed = Bed(rank, channel="let go")
        tensor = weakref.ref(bed.shard if bed.shard is not None else bed.out)
        channel, kept = weakref.ref(bed.mover._session.channel), bed.mover._execution.kept
        assert kept.repeat is not None
        bed.shard = bed.out = None
        assert tensor() is None
        assert kept.repeat is None
        assert not kept.bindings
        del kept
        other = Bed(rank, channel="let go")
        del bed, other
        assert channel() is None
    finally:
        gc.enable()


def test_a_repeat_keeps_nothing_alive(ranks: Ranks) -> None:
    ranks.run(let_go)


def past(rank: int) -> None:
    """Rank 3 fails after its call has returned here; others that may still be in it are told, and the next works."""
    bed = Bed(rank, ROWS_OF_ALL, COLUMNS_OF_ALL) if rank < SIZE else None
    for _ in range(3):
        dist.barrier()
        if bed is None:
            continue
        if rank == 3:
            communicator = bed.mover._session.communicator
            communicator.abort("rank 3 failed in the call before", communicator.call)
        for _ in range(BEFORE + 1):
            bed.call()


def test_a_failure_of_the_call_before_is_met_by_making_the_call_anew(ranks: Ranks) -> None:
    ranks.run(past)


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.resize_(6, 4),
        lambda one: one.t_(),
        lambda one: one.requires_grad_(),
        lambda one: setattr(one, "data", torch.zeros(4, 6)),
        lambda one: setattr(one, "data", one.data.view(torch.int32)),
    ],
)
def test_a_tensor_is_the_one_before_only_as_it_was(change: Callable[[torch.Tensor], object]) -> None:
    tensor = torch.zeros(4, 6)
    seen = Unchanged(tensor, weakref.ref(tensor))
    assert seen.is_same(tensor)
    assert not any(map(seen.is_same, (None, torch.zeros(4, 6), tensor.view(4, 6), tensor.numpy())))
    change(tensor)
    assert not seen.is_same(tensor)
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None, "it is not kept"


def many(rank: int) -> None:
    if rank >= SIZE:
        return
    bed = Bed(rank)
    tally, before = bed.mover._execution.tally, bed.mover.stats
    assert not tally.noted
    for _ in range(MOST_NOTED + 7):
        bed.mover(bed.shard, out=bed.out)
    assert len(tally.noted) == 7
    after = bed.mover.stats
    assert after.calls == before.calls + MOST_NOTED + 7
    assert after.post_seconds > before.post_seconds


def test_repeats_are_added_up_when_they_are_many_or_somebody_looks(ranks: Ranks) -> None:
    ranks.run(many)
