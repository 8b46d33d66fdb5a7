"""Versions of tensors from side to side: published when all have them whole, or nowhere."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.connect.jobs import join, raised, together, worlds_of
from tests.oracle import pick
from tricomm import Feed, Latest, Meeting, Mesh, Push, Replicate, Shard, ShardingSpec, SpecError, TransportError, World
from tricomm.connect.feeds import ballot
from tricomm.connect.feeds.ballot import Offer

SHAPES = {"a": (10, 6), "b": (7, 4)}
OWN = {
    "trainer": {
        name: ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), shape, "float32") for name, shape in SHAPES.items()
    },
    "server": {name: ShardingSpec(Mesh([0, 1, 2], ("tp",)), (Shard(1),), dtype="bfloat16") for name in SHAPES},
}


def full(name: str, version: int) -> torch.Tensor:
    rows, columns = SHAPES[name]
    return torch.arange(float(rows * columns)).reshape(rows, columns) + 100 * version


class Rank:
    """One rank: its world, feed and tensors."""

    def __init__(self, world: World, before: "Rank | None" = None, seconds: float = 30.0, **options: Any) -> None:
        self.world = world
        self.specs = world.exchange(OWN[world.side], 10)
        self.is_source = world.side == "trainer"
        self.feed = Feed(
            world, self.specs, source="trainer", destination="server", timeout_seconds=seconds,
            before=None if before is None else before.feed, **options,
        )  # fmt: skip
        if before is not None:
            self.tensors = before.tensors
            return
        self.tensors = {name: self.shard(name, 0) for name in SHAPES}

    def shard(self, name: str, version: int) -> torch.Tensor:
        spec = self.specs[self.world.side][name]
        if self.is_source:
            return pick(full(name, version), spec, self.world.rank())
        spec = replace(spec, shape=SHAPES[name])
        return pick(full(name, version).bfloat16(), spec, self.world.rank())

    def train(self, version: int) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(self.shard(name, version))

    def push(self, version: int, **options: Any) -> Push:
        return self.feed.push(self.tensors, version, **options)

    def pull(self, seconds: float = 30.0) -> Offer | None:
        return self.feed.pull(self.tensors, seconds)

    def require(self, version: int) -> None:
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, self.shard(name, version)), f"{name} of {self.world}"


@pytest.fixture
def ranks(meeting: Meeting, worlds: list[World]) -> list[Rank]:
    found = raised(together(*(lambda w=w: Rank(w) for w in worlds)))
    found[0].meeting = meeting
    return found


def all_of(ranks: list[Rank], call: Callable[[Rank], Any]) -> list[Any]:
    return together(*(lambda r=r: call(r) for r in ranks))


def moved(rank: Rank, version: int, **options: Any) -> Any:
    """One push on either side, waited for."""
    if not rank.is_source:
        return rank.pull()
    rank.train(version)
    return rank.push(version, wait_seconds=20.0, **options).wait()


def test_versions_are_published_one_after_the_other(ranks: list[Rank]) -> None:
    assert raised(all_of(ranks, lambda r: r.feed.latest())) == [Latest(None, "")] * 5
    for version in range(1, 6):
        found = raised(all_of(ranks, lambda r: moved(r, version)))  # noqa: B023
        assert found == [True, True] + [Offer(version, None)] * 3
        for rank in ranks[2:]:
            rank.require(version)
            assert (rank.feed.held, rank.feed.dirty) == (version, "")
        assert raised(all_of(ranks, lambda r: r.feed.latest())) == [Latest(version, "")] * 5


def test_a_feed_keeps_as_little_of_many_pushes_as_of_few(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballot, "MAX_KEPT", 3)
    store = ranks[0].world.get_group_store()
    found = []
    for version in range(1, 11):
        ranks[2].feed.ready()
        raised(all_of(ranks[:2], lambda r: r.push(version)))  # noqa: B023
        raised(all_of(ranks, lambda r: moved(r, version)))  # noqa: B023
        found.append(store.num_keys())
    assert found[-1] == found[4] < found[0] + 4 * (found[1] - found[0])
    assert raised(all_of(ranks, lambda r: r.feed.latest())) == [Latest(10, "")] * 5


def test_a_push_whose_bytes_were_lost_is_published_nowhere(meeting: Meeting, worlds: list[World]) -> None:
    ranks = raised(together(*(lambda w=w: Rank(w, checksum=True) for w in worlds)))
    assert raised(all_of(ranks, lambda r: moved(r, 1))) == [True, True] + [Offer(1, None)] * 3
    session: Any = ranks[3].feed._movers._mover._session
    run = session.run

    def wrong(execution: Any, sources: Any, destinations: Any, number: int, *gate: Any) -> None:
        run(execution, sources, destinations, number, *gate)
        destinations[1][6, 0] += 1

    session.run = wrong
    for error in all_of(ranks, lambda r: moved(r, 2)):
        assert "tensor 'b' on rank 3 is not what rank 1 has: their digests differ" in str(error)
    session.run = run
    assert raised(all_of(ranks, lambda r: moved(r, 3))) == [True, True] + [Offer(3, None)] * 3
    for rank in ranks[2:]:
        rank.require(3)


def test_a_destination_that_is_not_ready_is_skipped_before_the_start(ranks: list[Rank]) -> None:
    ranks[2].feed.ready()
    began = time.monotonic()
    for version in (1, 2, 3):
        for push in raised(all_of(ranks[:2], lambda r: r.push(version))):  # noqa: B023
            assert (push.is_started, push.skipped, push.wait(), push.done()) == (
                False,
                "1 of 3 ranks are ready, but not ranks 3-4",
                False,
                True,
            )
            push.wait_source()
    assert time.monotonic() - began < 2.0
    assert ranks[3].feed.offered() is None
    assert ranks[3].feed.latest() == Latest(None, "")
    raised(all_of(ranks, lambda r: moved(r, 4)))
    for rank in ranks[2:]:
        rank.require(4)


def test_a_push_that_started_waits_for_the_destination(ranks: list[Rank]) -> None:
    for rank in ranks[2:]:
        rank.feed.ready()
        rank.feed.ready()
    for rank in ranks[:2]:
        rank.train(7)
    pushes = raised(all_of(ranks[:2], lambda r: r.push(7)))
    assert all(push.is_started and not push.done() for push in pushes)
    assert ranks[2].feed.offered() == Offer(7, None)
    assert ranks[0].feed.latest() == Latest(None, "the push of version 7 is under way")
    time.sleep(0.5)
    assert raised(all_of(ranks[2:], lambda r: r.pull(0.1))) == [Offer(7, None)] * 3
    assert all(push.wait() for push in pushes)
    assert ranks[0].feed.latest() == Latest(7, "")


@pytest.mark.parametrize("beside", ["fence", "snapshot"])
def test_the_source_may_change_when_it_is_told(ranks: list[Rank], beside: str) -> None:
    """Beside training: by snapshot before the destination begins, by fence only after it began."""
    may_begin, began = threading.Event(), threading.Event()
    is_snapshot = beside == "snapshot"

    def step(rank: Rank) -> int:
        if not rank.is_source:
            # By snapshot, the destination begins only after a source was told that it may change.
            assert may_begin.wait(20.0 if is_snapshot else 0.3) or not is_snapshot
            began.set()
            rank.pull()
            return 0
        rank.train(3)
        push = rank.push(3, beside=beside)
        push.wait_source()
        assert began.is_set() or is_snapshot
        may_begin.set()
        rank.train(4)
        assert push.wait()
        return push.snapshot_nbytes

    for rank in ranks[2:]:
        rank.feed.ready()
    kept = [sum(tensor.nbytes for tensor in rank.tensors.values()) if is_snapshot else 0 for rank in ranks[:2]]
    assert raised(all_of(ranks, step)) == [*kept, 0, 0, 0]
    for rank in ranks[2:]:
        rank.require(3)


def test_a_rank_of_the_source_waits_for_its_own_part_alone(meeting: Meeting) -> None:
    """A fence ends when this rank has sent, though another one's destination has not even begun."""
    spec = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (8, 4), "float32")
    worlds = worlds_of(meeting, {"trainer": 2, "server": 2})
    may_pull, second = threading.Event(), 2

    def run(world: World) -> list[float]:
        feed = Feed(world, world.exchange({"w": spec}, 10), source="trainer", destination="server", timeout_seconds=20)
        found = []
        for version in (1, second):
            shard = torch.full((4, 4), float(10 * world.side_rank + version))
            if world.side == "server":
                feed.ready()
                if version == second and world.side_rank == 1:
                    assert may_pull.wait(15), "rank 0 of the trainer waits for what does not concern it"
                feed.pull({"w": shard.zero_()})
                found.append(float(shard.mean()))
                continue
            push = feed.push({"w": shard}, version, wait_seconds=10)
            push.wait_source()
            if version == second and world.side_rank == 0:
                assert not push.done()
                may_pull.set()
            shard.fill_(-1.0)
            assert push.wait()
        return found

    assert raised(together(*(lambda w=w: run(w) for w in worlds)))[2:] == [[1.0, 2.0], [11.0, 12.0]]


def test_a_delta_needs_its_base_everywhere(ranks: list[Rank]) -> None:
    def refused(rank: Rank) -> str:
        if rank.is_source:
            try:
                rank.push(2, base_version=1, wait_seconds=5)
            except TransportError as error:
                return str(error)
        return str(rank.pull(0.5))

    words = raised(all_of(ranks, refused))
    assert (
        words[0]
        == words[1]
        == (
            "version 2 builds on version 1, and rank 0 of the destination holds nothing; push the whole, with "
            "base_version=None"
        )
    )
    assert words[2:] == ["None"] * 3
    raised(all_of(ranks, lambda r: moved(r, 2)))
    assert raised(all_of(ranks, lambda r: moved(r, 3, base_version=2)))[2:] == [Offer(3, 2)] * 3


def test_a_failed_push_is_published_nowhere_and_stays_dirty_until_a_whole_one(ranks: list[Rank]) -> None:
    raised(all_of(ranks, lambda r: moved(r, 1)))

    def failing(rank: Rank) -> Any:
        if rank.world.rank() == 3:
            rank.feed.pull({"a": torch.zeros(1), "b": rank.tensors["b"]}, 8.0)
        return moved(rank, 2)

    errors = all_of(ranks, failing)
    assert isinstance(errors[3], SpecError)
    for index in (0, 1, 2, 4):
        assert isinstance(errors[index], TransportError)
        # Whoever hears of it first says so to all: the rank itself, or one whose connection it closed.
        text = str(errors[index]).replace("rank 3 refused the call", "rank 3")
        assert "the push of version 2 failed: rank 3: SpecError: " in text
    for rank in ranks[2:]:
        assert rank.feed.held is None
        assert "the push of version 2 failed: rank 3" in rank.feed.dirty
    for latest in raised(all_of(ranks, lambda r: r.feed.latest())):
        assert latest.version == 1
        assert "the push of version 2 failed: rank 3" in latest.dirty
    delta = all_of(ranks, lambda r: moved(r, 3, base_version=1) if r.is_source else r.pull(0.5))
    assert "holds the push of version 2 failed" in str(delta[0])
    raised(all_of(ranks, lambda r: moved(r, 4)))
    assert ranks[1].feed.latest() == Latest(4, "")
    for rank in ranks[2:]:
        rank.require(4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "tensor"),
        ({"a": None}, "out"),
        ({"c": torch.zeros(2)}, "c"),
    ],
)
def test_a_missing_or_surplus_tensor_fails_the_push_for_all_at_once(
    ranks: list[Rank], given: dict[str, Any], words: str
) -> None:
    def odd(rank: Rank) -> Any:
        wrong = {**rank.tensors, **given} if given else {}
        if rank.world.rank() == (3 if given else 1):
            return rank.feed.pull(wrong, 8.0) if given else rank.feed.push(wrong, 1, wait_seconds=5)
        return moved(rank, 1)

    began = time.monotonic()
    errors = all_of(ranks, odd)
    assert time.monotonic() - began < 5.0
    assert all(isinstance(error, SpecError | TransportError) for error in errors)
    assert all(words in str(error) for error in errors)
    raised(all_of(ranks, lambda r: moved(r, 2)))


def test_a_destination_that_gives_no_tensors_is_refused(ranks: list[Rank]) -> None:
    """Rather than that a version is published which nobody has."""
    errors = all_of(ranks, lambda r: r.feed.pull({}, 8.0) if r.world.rank() == 4 else moved(r, 1))
    assert all(isinstance(error, SpecError | TransportError) for error in errors), errors
    assert ranks[0].feed.latest().version is None


def test_who_waits_for_a_newer_version_gets_it(ranks: list[Rank]) -> None:
    def waiting() -> int:
        return ranks[2].feed.wait_newer(1, 10.0)

    def pushing() -> None:
        for version in (1, 2):
            raised(all_of(ranks, lambda r: moved(r, version)))  # noqa: B023

    found, _ = raised(together(waiting, pushing))
    assert found == 2
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"no version newer than 2 was published within 0\.3 s"):
        ranks[0].feed.wait_newer(2, 0.3)
    assert time.monotonic() - began < 1.0


def test_ranks_of_the_source_that_push_different_versions_are_named(ranks: list[Rank]) -> None:
    errors = all_of(ranks, lambda r: moved(r, 5 if r.world.rank() == 1 else 4))
    for error in errors:
        assert "rank 1 pushes version 5, and rank 0 of its side version 4" in str(error)


def test_calls_on_the_wrong_side_and_with_wrong_names_are_refused(ranks: list[Rank]) -> None:
    with pytest.raises(SpecError, match="only ranks of the source may"):
        ranks[2].push(1)
    with pytest.raises(SpecError, match="only ranks of the destination may"):
        ranks[0].pull()
    with pytest.raises(SpecError, match='neither "fence" nor "snapshot"'):
        ranks[0].push(1, beside="wall")
    with pytest.raises(SpecError, match="version=-1 must be at least 0"):
        ranks[0].push(-1)
    odd = {"trainer": {"a": ranks[0].specs["trainer"]["a"]}, "server": ranks[0].specs["server"]}
    with pytest.raises(SpecError, match="only side 'server' has tensor 'b'"):
        Feed(ranks[0].world, odd, source="trainer", destination="server")
    with pytest.raises(SpecError, match="within one side, use a Resharder"):
        Feed(ranks[0].world, odd, source="trainer", destination="trainer")


def test_a_destination_that_starts_again_gets_the_next_version(ranks: list[Rank]) -> None:
    """The epoch ends, they pair anew, and those that stayed say what they hold."""
    raised(all_of(ranks, lambda r: moved(r, 1)))
    meeting = ranks[0].meeting  # type: ignore[attr-defined]
    ranks[4].world._client.connection._socket.close()  # as when its process is killed
    time.sleep(0.1)
    errors = all_of(ranks[:4], lambda r: moved(r, 2))
    assert all("epoch 1 is over: rank 4, which is rank 2 of side 'server'" in str(error) for error in errors)
    assert [rank.feed.held for rank in ranks[2:4]] == [1, 1], "nothing had begun"

    def again(rank: Rank | None) -> Rank:
        if rank is None:
            return Rank(join(meeting, "server", 2, {"trainer": None, "server": 3}))
        return Rank(rank.world.renew(20.0), rank)

    anew = raised(together(*(lambda r=r: again(r) for r in [*ranks[:4], None])))
    assert {rank.world.epoch for rank in anew} == {2}
    assert anew[0].feed.latest() == Latest(None, ""), "not all hold version 1"
    raised(all_of(anew, lambda r: moved(r, 2)))
    for rank in anew[2:]:
        rank.require(2)


def test_a_source_that_leaves_is_told_to_those_that_wait(ranks: list[Rank]) -> None:
    raised(all_of(ranks, lambda r: moved(r, 1)))
    for rank in ranks[:2]:
        rank.world.close()
    began = time.monotonic()
    errors = all_of(ranks[2:], lambda r: r.pull(20.0))
    assert time.monotonic() - began < 3.0
    assert all("of side 'trainer'" in str(e) and "has left epoch 1" in str(e) for e in errors)
    assert all("there will be no push" in str(error) for error in errors)


def test_replicas_and_feeds_of_their_own_names(ranks: list[Rank]) -> None:
    specs = {
        "trainer": {"w": ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (4, 4), "float32")},
        "server": {"w": ShardingSpec(Mesh([2, 3, 4], ("dp",)), (Replicate(),))},
    }

    def run(rank: Rank) -> torch.Tensor | None:
        feed = Feed(rank.world, specs, source="trainer", destination="server", name="second ", timeout_seconds=8)
        if rank.is_source:
            assert feed.push({"w": torch.full((2, 4), float(rank.world.rank()))}, 1, wait_seconds=5).wait()
            return None
        out = torch.empty(4, 4)
        assert feed.pull({"w": out}) == Offer(1, None)
        return out

    for found in raised(all_of(ranks, run))[2:]:
        assert found[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
