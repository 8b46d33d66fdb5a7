"""Separate jobs over NCCL, as far as it goes without a GPU: the streams and messages of a stand-in, our own store."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.connect.feeds.test_feed import Rank, all_of, moved
from tests.connect.jobs import SIZES, join, raised, together, worlds_of
from tests.standin.ranks import Threads
from tricomm import Meeting, TransportError, World
from tricomm.connect import appointment
from tricomm.connect.feeds.ballot import Offer
from tricomm.connect.meeting.join import Join
from tricomm.transport.group import context_of
from tricomm.transport.nccl import NcclConnections


@pytest.fixture(params=["nccl", "memory"])
def threads(request: pytest.FixtureRequest) -> Iterator[Threads]:
    """Ranks whose devices nothing joins, or that share one."""
    with Threads(sum(SIZES.values())) as made:
        if request.param == "nccl":
            made.exports.identities |= {rank: f"{rank}" for rank in range(made.size)}
        yield made
        assert made.exports.faults == []


def on_devices(worlds: list[World], threads: Threads) -> list[World]:
    """Let each rank move by a stand-in of NCCL on a device of its own."""
    for world, standin in zip(worlds, threads.standins, strict=True):
        context_of(world).accelerator_of = lambda _, found=standin: found
    return worlds


def test_versions_are_pushed_over_nccl_and_the_next_epoch_too(meeting: Meeting, threads: Threads) -> None:
    worlds = on_devices(worlds_of(meeting, SIZES), threads)
    before: list[Any] = [None] * len(worlds)
    for epoch in (1, 2):
        ranks = raised(together(*(lambda w=w, b=b: Rank(w, b) for w, b in zip(worlds, before, strict=True))))
        for version in range(3 * epoch, 3 * epoch + 2):
            found = raised(all_of(ranks, lambda r: moved(r, version)))  # noqa: B023
            assert found == [True, True] + [Offer(version, None)] * 3
            for rank in ranks[2:]:
                rank.require(version)
        communicator = ranks[0].feed._movers._mover._session.communicator
        assert isinstance(communicator.connections.network, NcclConnections) == bool(threads.exports.identities)
        if epoch == 1:
            worlds, before = on_devices(raised(together(*(w.renew for w in worlds))), threads), ranks


def test_the_source_may_change_on_the_device_when_all_is_sent(meeting: Meeting, threads: Threads) -> None:
    """A fence lets nothing on the host wait for the device: what is queued afterwards runs after the sends."""
    worlds = on_devices(worlds_of(meeting, SIZES), threads)
    ranks = raised(together(*(lambda w=w: Rank(w) for w in worlds)))

    def step(rank: Rank) -> None:
        for version in (1, 2):
            if not rank.is_source:
                rank.pull()
                rank.require(version)
                continue
            rank.train(version)
            push = rank.push(version, wait_seconds=10.0)
            push.wait_source()
            device = threads.standins[rank.world.rank()].device
            device.current.launch(lambda: [tensor.fill_(-1.0) for tensor in rank.tensors.values()])
            assert push.wait()
            threads.finish(rank.world.rank())

    raised(all_of(ranks, step))


def test_a_rank_that_dies_is_named_over_nccl(meeting: Meeting, threads: Threads) -> None:
    worlds = on_devices(worlds_of(meeting, SIZES), threads)
    ranks = raised(together(*(lambda w=w: Rank(w, seconds=10.0) for w in worlds)))
    raised(all_of(ranks, lambda r: moved(r, 1)))
    worlds[3]._client.connection._socket.close()
    found = together(*(lambda r=r: moved(r, 2) for r in ranks if r.world.rank() != 3))
    assert all(isinstance(one, TransportError) for one in found), found
    assert all("rank 3, which is rank 1 of side 'server'" in str(one) for one in found), found


@pytest.mark.parametrize("uuids", [("GPU-1", "GPU-1"), ("GPU-1", "GPU-2")], ids=["one GPU", "two GPUs"])
def test_two_ranks_on_one_gpu_are_refused_on_both_sides_before_nccl_sees_them(
    meeting: Meeting, uuids: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = appointment.join_of

    def on_gpu(*given: Any) -> Join:
        found = real(*given)
        facts = tuple((what, "nccl" if what == "backend" else value) for what, value in found.facts)
        return replace(found, gpu=uuids[found.side == "server"], facts=facts)

    monkeypatch.setattr(appointment, "join_of", on_gpu)
    sizes: dict[str, int | None] = {"trainer": 1, "server": 1}
    found = together(*(lambda s=s: join(meeting, s, 0, sizes, timeout_seconds=10) for s in sizes))
    if uuids[0] != uuids[1]:
        assert [world.epoch for world in raised(found)] == [1, 1]
        return
    assert len({str(one) for one in found}) == 1
    for words in ("rank 0 of side 'trainer'", "rank 0 of side 'server'", "are both on GPU GPU-1", 'device="cpu"'):
        assert words in str(found[0])
    assert all(isinstance(one, TransportError) for one in found)
