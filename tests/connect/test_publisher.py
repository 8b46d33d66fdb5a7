"""A trainer that never waits for its fleets, and fleets that come late, are slow, or start again."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.connect.jobs import SECRET, raised, together
from tests.oracle import pick
from tricomm import Meeting, Mesh, Publisher, Replicate, Shard, ShardingSpec, SpecError, Subscriber, TransportError
from tricomm.transport.coordination.store import GroupOverError

SHAPE = (10, 6)
TRAINER = {"w": ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), SHAPE, "float32")}
FLEETS = {
    "columns": {"w": ShardingSpec(Mesh([0, 1, 2], ("tp",)), (Shard(1),), SHAPE, "bfloat16")},
    "copies": {"w": ShardingSpec(Mesh([0, 1], ("dp",)), (Replicate(),), SHAPE, "float32")},
}


def full(version: int) -> torch.Tensor:
    return torch.arange(60.0).reshape(SHAPE) + version


class Fleet:
    """The ranks of a fleet, each polling on a thread of its own until it is stopped."""

    def __init__(self, meeting: Meeting, name: str, pause_seconds: float = 0.01) -> None:
        self.specs, self.pause_seconds = FLEETS[name], pause_seconds
        self.stopped = threading.Event()
        self.seen: list[list[int]] = [[] for _ in self.specs["w"].mesh.ranks]
        self.errors: list[str] = []
        self.is_killed = False
        self.subscribers: list[Subscriber | None] = [None] * len(self.seen)

        def run(rank: int) -> None:
            out = {
                "w": torch.zeros(self.specs["w"].local_shape(rank), dtype=getattr(torch, self.specs["w"].dtype or ""))
            }
            with suppress(GroupOverError), Subscriber(
                meeting.address, side=name, side_rank=rank, side_size=len(self.seen), source="trainer",
                specs=self.specs, out=out, secret=SECRET, device="cpu", timeout_seconds=30,
            ) as subscriber:  # fmt: skip
                self.subscribers[rank] = subscriber
                agree = subscriber._agreement.decide
                while agree(lambda: str(self.stopped.is_set())) != "True":
                    try:
                        version = subscriber.poll()
                    except TransportError as error:
                        if self.is_killed:
                            return
                        self.errors.append(str(error))
                        continue
                    if version is not None:
                        want = pick(full(version), self.specs["w"], rank).to(out["w"].dtype)
                        assert torch.equal(out["w"], want)
                        self.seen[rank].append(version)
                    time.sleep(self.pause_seconds)

        self.threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(self.seen))]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        assert len({tuple(seen) for seen in self.seen}) == 1, "all ranks take a version in the same call"

    def kill(self) -> None:
        """Break the connections, as when the processes are killed."""
        self.is_killed = True
        for subscriber in self.subscribers:
            assert subscriber is not None
            subscriber._agreement.world._client.connection._socket.close()
            if subscriber._feed is not None:
                subscriber._feed.world._client.connection._socket.close()


class Trainer:
    """Two ranks that push what they compute."""

    def __init__(self, meeting: Meeting, fleets: list[str]) -> None:
        self.version = 0

        def begin(rank: int) -> Publisher:
            return Publisher(
                meeting.address, side="trainer", side_rank=rank, side_size=2, fleets=fleets, specs=TRAINER,
                secret=SECRET, device="cpu", timeout_seconds=30,
            )  # fmt: skip

        self.publishers = raised(together(lambda: begin(0), lambda: begin(1)))

    def step(self, wait_seconds: float = 0.0) -> list[dict[str, Any]]:
        """One step of both ranks; what each fleet is told."""
        self.version += 1
        version = self.version

        def run(rank: int) -> Any:
            publisher = self.publishers[rank]
            shard = pick(full(version), TRAINER["w"], rank)
            found = publisher.push({"w": shard}, version, wait_seconds=wait_seconds)
            publisher.wait_source()
            shard.zero_()
            return {name: push.skipped or push for name, push in found.items()}

        return raised(together(lambda: run(0), lambda: run(1)))

    def until(self, is_so: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, "it never came"
            self.step()
            time.sleep(0.02)

    def close(self) -> None:
        raised(together(*(publisher.close for publisher in self.publishers)))


def test_fleets_of_different_layouts_one_late_one_slow(meeting: Meeting) -> None:
    trainer = Trainer(meeting, ["columns", "copies"])
    began = time.monotonic()
    (told, other) = trainer.step()
    assert told == other
    assert "side 'columns' is not there: waiting for all of side 'trainer' and all of side 'columns'" in told["columns"]
    assert time.monotonic() - began < 1.0
    columns = Fleet(meeting, "columns")
    trainer.until(lambda: len(columns.seen[0]) >= 3)
    copies = Fleet(meeting, "copies", pause_seconds=0.3)
    trainer.until(lambda: len(copies.seen[0]) >= 2)
    assert len(columns.seen[0]) > len(copies.seen[0]), "the slow one is skipped, the other is not"
    for fleet in (columns, copies):
        fleet.stop()
        assert fleet.errors == []
        assert fleet.seen[0] == sorted(set(fleet.seen[0]))
    trainer.close()


def test_a_fleet_that_starts_again_and_a_trainer_that_starts_again(meeting: Meeting) -> None:
    trainer = Trainer(meeting, ["columns"])
    fleet = Fleet(meeting, "columns")
    trainer.until(lambda: len(fleet.seen[0]) >= 2)
    fleet.kill()
    again = Fleet(meeting, "columns")
    trainer.until(lambda: len(again.seen[0]) >= 2)
    for publisher in trainer.publishers:
        publisher._agreement.world._client.connection._socket.close()
        publisher._fleets[0].feed.world._client.connection._socket.close()
    anew = Trainer(meeting, ["columns"])
    anew.version = 1000
    anew.until(lambda: again.seen[0][-1] > 1000)
    again.stop()
    assert len(again.errors) <= 3, "at most one failed call on each rank"
    anew.close()


def test_a_server_waits_for_its_first_version(meeting: Meeting) -> None:
    specs, out = {"w": ShardingSpec(Mesh([0], ("x",)), (Shard(0),), SHAPE, "float32")}, {"w": torch.zeros(SHAPE)}

    def serve() -> int:
        with Subscriber(
            meeting.address, side="server", side_rank=0, side_size=1, source="trainer", specs=specs, out=out,
            secret=SECRET, device="cpu",
        ) as subscriber:  # fmt: skip
            with pytest.raises(SpecError, match="must be a number of seconds"):
                subscriber.wait("long")  # type: ignore[arg-type]
            with pytest.raises(TransportError, match=r"side 'trainer' pushed no version within 0\.2 s"):
                subscriber.wait(0.2)
            version = subscriber.wait(20.0)
            assert (subscriber.version, subscriber.dirty) == (version, "")
            return version

    def train() -> None:
        time.sleep(1.0)
        trainer = Trainer(meeting, ["server"])
        trainer.until(lambda: bool(out["w"].sum() != 0))
        trainer.close()

    version, _ = raised(together(serve, train))
    assert torch.equal(out["w"], full(version))


def test_ranks_of_a_fleet_that_differ_are_told_once_and_what_of(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = threading.Semaphore(0)
    real = Subscriber._feed_between

    def counted(*arguments: Any) -> Any:
        tried.release()
        return real(*arguments)

    monkeypatch.setattr(Subscriber, "_feed_between", counted)
    trainer = Trainer(meeting, ["columns"])

    def serve(rank: int) -> Subscriber:
        specs = {"w": replace(FLEETS["columns"]["w"], dtype="float32" if rank == 2 else "bfloat16")}
        return Subscriber(
            meeting.address, side="columns", side_rank=rank, side_size=3, source="trainer", specs=specs, out={},
            secret=SECRET, device="cpu", timeout_seconds=30,
        )  # fmt: skip

    subscribers = raised(together(*(lambda rank=rank: serve(rank) for rank in range(3))))
    trainer.until(lambda: tried._value >= 3 * 4)
    for one in (*subscribers, trainer):
        one.close()
    told = [one.getMessage() for one in caplog.records if "says other layouts" in one.getMessage()]
    assert 1 <= len(told) <= 3 + 2, "one line of each rank, however often they try"
    for text in told:
        assert "rank 2 of side 'columns' says other layouts than its rank 0: 'w' is float32[10, 6/tp]" in text


def first_version(trainer: Trainer, *subscribers: Subscriber) -> None:
    """Train until all ranks of a fleet have taken one."""
    trained = threading.Thread(target=lambda: trainer.until(lambda: all(one.version for one in subscribers)))
    trained.start()
    waits = [lambda one=one: one.wait(20.0) for one in subscribers]
    raised(together(*waits))
    while trained.is_alive():
        raised(together(*(one.poll for one in subscribers)))
    trained.join()


def test_a_rank_of_the_own_job_that_died_is_told_with_what_all_must_do_and_logged_once(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    def serve(rank: int, timeout_seconds: float = 30.0) -> Subscriber:
        return Subscriber(
            meeting.address, side="copies", side_rank=rank, side_size=2, source="trainer", specs=FLEETS["copies"],
            out={"w": torch.zeros(SHAPE)}, secret=SECRET, device="cpu", timeout_seconds=timeout_seconds,
        )  # fmt: skip

    trainer = Trainer(meeting, ["copies"])
    survivor, dead = raised(together(lambda: serve(0), lambda: serve(1)))
    first_version(trainer, survivor, dead)
    for world in (dead._feed.world, dead._agreement.world):
        world._client.connection._socket.close()
    deadline = time.monotonic() + 20
    while not (survivor._feed.world.refresh() and survivor._agreement.world.refresh()):
        assert time.monotonic() < deadline
    caplog.clear()
    remedy = "all ranks of side 'copies' close their Publisher or Subscriber and make a new one"
    for _ in range(5):
        with pytest.raises(GroupOverError, match=rf"rank 1 of side 'copies' .* died.*; {remedy}"):
            survivor.poll()
    told = [one.getMessage() for one in caplog.records if "rank 1 of side 'copies'" in one.getMessage()]
    assert len(told) == len(set(told))
    with pytest.raises(TransportError) as caught:
        serve(1, timeout_seconds=2.5)
    hint = "rank 0 of side 'copies' is there and has not made a new Publisher or Subscriber, as all ranks of a side"
    assert hint in str(caught.value)
    assert any("gave up" not in text and hint in text for text in caplog.messages)
    survivor.close()
    survivor, again = raised(together(lambda: serve(0), lambda: serve(1)))
    first_version(trainer, survivor, again)
    for one in (survivor, again, trainer):
        one.close()


def test_what_makes_no_sense_is_refused(meeting: Meeting) -> None:
    for fleets in ([], ["trainer"], ["a", "a"]):
        with pytest.raises(SpecError, match=r"must be other sides than 'trainer', each once"):
            Trainer(meeting, fleets)
