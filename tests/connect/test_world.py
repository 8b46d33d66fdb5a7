"""Ranks of separate jobs become one group, or are told why not; here all are threads of one process."""

import gc
import os
import socket
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.connect.jobs import SECRET, SIZES, join, raised, together, usage, worlds_of
from tests.oracle import pick, require_equal
from tricomm import Meeting, Mesh, Missing, Resharder, Shard, ShardingSpec, SpecError, TransportError, World
from tricomm.connect.told.exchange import Exchange

FULL = torch.arange(60.0).reshape(10, 6)
ROWS = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (10, 6), "float32")
COLUMNS = ShardingSpec(Mesh([2, 3, 4], ("tp",)), (Shard(1),), (10, 6), "float32")


def push(world: World) -> torch.Tensor | None:
    """Move the rows of the trainer to the columns of the server."""
    rank = world.rank()
    shard = pick(FULL, ROWS, rank) if rank in ROWS.mesh else None
    found = tricomm.reshard(shard, ROWS, COLUMNS, group=world, timeout_seconds=30)
    if rank in COLUMNS.mesh:
        require_equal(found, pick(FULL, COLUMNS, rank), f"rank {rank}")
    return found


def test_jobs_that_share_no_group_move_tensors(meeting: Meeting) -> None:
    environment = dict(os.environ)
    worlds = worlds_of(meeting, SIZES)
    assert [world.rank() for world in worlds] == list(range(5))
    assert [(world.side, world.side_rank) for world in worlds][1:3] == [("trainer", 1), ("server", 0)]
    assert worlds[0].ranks_of("server") == (2, 3, 4)
    assert {world.epoch for world in worlds} == {1}
    raised(together(*(lambda w=w: push(w) for w in worlds)))
    raised(together(*(lambda w=w: push(w) for w in worlds)))
    assert not dist.is_initialized(), "the job's default group is its own"
    assert dict(os.environ) == environment
    with pytest.raises(SpecError, match=r"side 'eval' is none of \['trainer', 'server'\]"):
        worlds[0].ranks_of("eval")


def test_beside_a_default_group_of_the_job(meeting: Meeting) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        worlds = worlds_of(meeting, SIZES)
        raised(together(*(lambda w=w: push(w) for w in worlds)))
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 1
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


def test_torch_distributed_takes_it_after_enable_collectives(meeting: Meeting) -> None:
    def use(world: World) -> None:
        world.enable_collectives()
        total = torch.full((2,), float(world.rank()))
        dist.all_reduce(total, group=world)
        assert total.tolist() == [10.0, 10.0]
        dist.broadcast(total, group=world, group_src=1)
        dist.barrier(group=world)
        names: list[Any] = [None] * world.size()
        dist.all_gather_object(names, world.side_rank, group=world)
        assert names == [0, 1, 0, 1, 2]

    raised(together(*(lambda w=w: use(w) for w in worlds_of(meeting, SIZES, timeout_seconds=10))))


def test_three_sides_and_a_side_that_says_its_own_size(meeting: Meeting) -> None:
    sizes: dict[str, int | None] = {"trainer": 1, "server": None, "judge": None}
    calls = [lambda: join(meeting, "trainer", 0, sizes)]
    calls += [lambda r=r: join(meeting, "server", r, {**sizes, "trainer": None, "server": 2}) for r in (0, 1)]
    calls += [lambda: join(meeting, "judge", 0, {**sizes, "judge": 1})]
    worlds = raised(together(*calls))
    assert [world.rank() for world in worlds] == [0, 1, 2, 3]
    assert worlds[0].side_sizes == {"trainer": 1, "server": 2, "judge": 1}


def test_fleets_meet_the_trainer_apart_and_one_comes_late(meeting: Meeting) -> None:
    first = worlds_of(meeting, {"trainer": 2, "fleet a": 3})
    raised(together(*(lambda w=w: push(w) for w in first)))
    time.sleep(0.2)
    late = worlds_of(meeting, {"trainer": 2, "fleet b": 3})
    raised(together(*(lambda w=w: push(w) for w in [*first, *late])))
    named = worlds_of(meeting, {"trainer": 2, "fleet a": 3}, name="evaluation")
    assert named[0].epoch == 1, "another meeting of the same sides"
    assert not first[0].over


def test_hosts_of_all_sides_are_one_topology(meeting: Meeting) -> None:
    sizes = {"trainer": 1, "server": 1}
    found = raised(
        together(
            lambda: join(meeting, "trainer", 0, dict(sizes), host="north"),
            lambda: join(meeting, "server", 0, dict(sizes), host="south"),
        )
    )
    assert found[0].topology().hosts == ("north", "south")
    assert found[1].topology(nics_per_host=2, nic_bytes_per_second=25e9).nics_per_host == 2


# ---- what they tell each other

OWN_ROWS = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (10, 6), "float32")
OWN_COLUMNS = ShardingSpec(Mesh([0, 1, 2], ("tp",)), (Shard(1),))


def exchange(world: World, specs: dict[str, ShardingSpec] | None = None, seconds: float = 10.0) -> Any:
    own = {"trainer": {"w": OWN_ROWS}, "server": {"w": OWN_COLUMNS}}[world.side]
    return world.exchange(own if specs is None else specs, seconds)


def test_each_side_tells_its_layouts_and_needs_no_others(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    for found in raised(together(*(lambda w=w: exchange(w) for w in worlds))):
        assert found == {"trainer": {"w": ROWS}, "server": {"w": replace(COLUMNS, shape=None, dtype=None)}}
    worlds = raised(together(*(w.renew for w in worlds)))
    fetched: list[str] = []
    real = Exchange._fetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "_fetch", lambda self, side, *rest: fetched.append(side) or real(self, side, *rest))
        raised(together(*(lambda w=w: exchange(w) for w in worlds)))
        assert fetched == [], "known by their digests"
        for found in raised(together(*(lambda w=w: exchange(w, {}) for w in worlds))):
            assert found == {"trainer": {}, "server": {}}


def test_a_rank_that_says_other_layouts_than_its_side_is_named_to_all(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    odd = {"w": replace(OWN_COLUMNS, dtype="bfloat16")}
    errors = together(*(lambda w=w: exchange(w, odd if w.rank() == 3 else None) for w in worlds))
    text = "rank 1 of side 'server' says other layouts than its rank 0: 'w' is bfloat16[?"
    assert all(text in str(error) and " for rank 1, and " in str(error) for error in errors), errors
    more = {"w": OWN_COLUMNS, "bias": OWN_COLUMNS}
    errors = together(*(lambda w=w: exchange(w, more if w.rank() == 3 else None) for w in worlds))
    assert all("than its rank 0: only rank 1 has 'bias'; all ranks" in str(error) for error in errors), errors
    raised(together(*(lambda w=w: exchange(w) for w in worlds)))


def test_a_side_that_does_not_exchange_is_named_in_time(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    began = time.monotonic()
    errors = together(*(lambda w=w: exchange(w, seconds=1.0) for w in worlds[:2]))
    assert time.monotonic() - began < 2.0
    assert all("until rank 0 of side 'server' tells its layouts" in str(error) for error in errors)
    with pytest.raises(SpecError, match="the side has 2 ranks"):
        worlds[0].exchange({"w": OWN_COLUMNS})


# ---- who does not come, and what is wrong with those that do


def test_who_waits_is_told_for_whom_and_gives_up_in_time(meeting: Meeting, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Missing] = []
    began = time.monotonic()
    (error,) = together(lambda: join(meeting, "trainer", 0, dict(SIZES), timeout_seconds=3.0, on_waiting=told.append))
    assert 2.9 < time.monotonic() - began < 4.0
    assert isinstance(error, TransportError)
    for text in (str(error), str(told[0]), caplog.text):
        assert "waiting for rank 1 of side 'trainer' and ranks 0, 1, 2 of side 'server' since" in text
    assert told[0].places == (("trainer", 1), ("server", 0), ("server", 1), ("server", 2))
    assert 2.0 <= told[0].seconds < 3.0
    assert "whether they were started" in str(error)


def test_a_wrong_secret_is_refused_at_once_and_those_that_wait_hear_of_it(meeting: Meeting) -> None:
    began = time.monotonic()
    times: list[float] = []

    def wrong() -> None:
        try:
            join(meeting, "server", 0, dict(SIZES), secret="something else ...")
        finally:
            times.append(time.monotonic() - began)

    waiting, refused = together(lambda: join(meeting, "trainer", 0, dict(SIZES), timeout_seconds=2.0), wrong)
    assert "it refused the secret; give all processes the same one" in str(refused)
    assert times[0] < 1.0
    assert "1 connection(s) had a wrong secret, the last from 127.0.0.1" in str(waiting)


def test_a_rank_that_comes_twice_is_refused_and_the_others_go_on(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    began = time.monotonic()
    (error,) = together(lambda: join(meeting, "server", 1, dict(SIZES)))
    assert f"process {os.getpid()}) is here already; start every rank once, or end the other first" in str(error)
    assert time.monotonic() - began < 6.0
    raised(together(*(lambda w=w: push(w) for w in worlds)))


@pytest.mark.parametrize("which", ["tricomm", "torch", "byte order"])
def test_other_versions_are_named_on_both_sides_before_anything_else(
    meeting: Meeting, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tricomm.connect import facts

    calls = iter(range(9))
    real = facts.facts_of
    monkeypatch.setattr(
        facts,
        "facts_of",
        lambda device: tuple((what, f"0.{next(calls)}" if what == which else value) for what, value in real(device)),
    )
    sizes: dict[str, int | None] = {"trainer": 1, "server": 1}
    errors = together(lambda: join(meeting, "trainer", 0, sizes), lambda: join(meeting, "server", 0, sizes))
    assert len({str(error) for error in errors}) == 1
    for word in (f"has {which} 0.0", f"{which} 0.1", "rank 0 of side 'trainer'", "rank 0 of side 'server'", "the same"):
        assert word in str(errors[0])


def test_sizes_that_differ_are_told_on_both_sides(meeting: Meeting) -> None:
    errors = together(
        lambda: join(meeting, "trainer", 0, {"trainer": 1, "server": 2}),
        lambda: join(meeting, "server", 0, {"trainer": 1, "server": 3}),
    )
    assert all("'server' has" in str(error) and "process" in str(error) for error in errors)


def test_nobody_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(
            TransportError, match=r"nobody takes connections at tcp://127.*start `python -m tricomm meet`"
        ):
            tricomm.connect(address, side="a", side_rank=0, side_sizes={"a": 1}, secret=SECRET, timeout_seconds=1)
        assert time.monotonic() - began < 2.0


def test_a_meeting_that_begins_late_is_waited_for() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]

    def begin() -> Meeting:
        time.sleep(0.5)
        return Meeting(f"tcp://127.0.0.1:{port}", secret=SECRET)

    meeting, world = raised(
        together(
            begin,
            lambda: tricomm.connect(
                f"tcp://127.0.0.1:{port}", side="a", side_rank=0, side_sizes={"a": 1}, secret=SECRET, timeout_seconds=10
            ),
        )
    )
    world.close()
    meeting.close()


def test_something_else_that_listens_is_told_apart() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def serve() -> None:
            connected, _ = other.accept()
            connected.sendall(b"HTTP/1.1 400 Bad Request, and some more of this kind\r\n")
            connected.close()

        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        _, error = together(
            serve, lambda: tricomm.connect(address, side="a", side_rank=0, side_sizes={"a": 1}, secret=SECRET)
        )
    assert "what answers there is no meeting of this version of tricomm (it says b'HTTP/1.1 400" in str(error)


def test_it_listens_to_its_own_address_alone() -> None:
    with Meeting("tcp://127.0.0.1:0", secret=SECRET) as meeting:
        port = int(meeting.address.rpartition(":")[2])
        with socket.socket() as other:
            other.settimeout(2)
            with pytest.raises(OSError, match=r"refused|unreachable"):
                other.connect(("127.0.0.2", port))
        with pytest.raises(SpecError, match=r"cannot be bound .*port 0 for a free one"):
            Meeting(meeting.address, secret=SECRET)


# ---- epochs


def test_a_rank_that_is_gone_ends_the_epoch_and_they_pair_anew(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    raised(together(*(lambda w=w: push(w) for w in worlds)))
    movers = [Resharder(ROWS, COLUMNS, group=world, timeout_seconds=30) for world in worlds]
    worlds[3]._client.connection._socket.shutdown(socket.SHUT_RDWR)
    time.sleep(0.2)
    began = time.monotonic()
    shards = [pick(FULL, ROWS, rank) if rank in (0, 1) else None for rank in range(5)]
    errors = together(*(lambda m=m, s=s: m(s) for m, s in zip(movers[:3], shards, strict=False)))
    assert time.monotonic() - began < 3.0
    for error in errors:
        assert "epoch 1 is over: rank 3, which is rank 1 of side 'server' (host " in str(error)
    time.sleep(1.2)
    assert "rank 3" in worlds[0].over
    others = [worlds[0], worlds[1], worlds[2], worlds[4]]
    again = raised(
        together(*(w.renew for w in others), lambda: join(meeting, "server", 1, {"trainer": None, "server": 3}))
    )
    assert {world.epoch for world in again} == {2}
    raised(together(*(lambda w=w: push(w) for w in again)))
    with pytest.raises(TransportError, match="epoch 1 is over"):
        push(worlds[0])
    raised(together(*(lambda w=w: push(w) for w in again)))


def test_a_fleet_of_another_size_takes_the_place_of_the_old_one(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    for world in worlds[2:]:
        world.close()
    sizes: dict[str, int | None] = {"trainer": None, "server": 1}
    again = raised(together(worlds[0].renew, worlds[1].renew, lambda: join(meeting, "server", 0, sizes)))
    assert again[0].side_sizes == {"trainer": 2, "server": 1}
    assert again[2].rank() == 2


def test_one_that_left_in_peace_is_named_and_not_waited_for(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    raised(together(*(lambda w=w: push(w) for w in worlds)))
    worlds[4].close()
    time.sleep(1.2)
    began = time.monotonic()
    errors = together(*(lambda w=w: push(w) for w in worlds[:4]))
    assert time.monotonic() - began < 5.0, "long before the timeout of the call"
    for error in errors:
        assert "rank 4, which is rank 2 of side 'server'" in str(error)
        assert "has left epoch 1" in str(error)


def test_a_meeting_that_ends_is_named(meeting: Meeting) -> None:
    worlds = worlds_of(meeting, SIZES)
    meeting.close()
    errors = together(*(lambda w=w: push(w) for w in worlds))
    assert all("the meeting at tcp://127.0.0.1" in str(error) and "is gone" in str(error) for error in errors)
    assert "is gone" in worlds[0].over


def test_what_it_holds_goes_with_it() -> None:
    before = usage()
    with Meeting("tcp://127.0.0.1:0", secret=SECRET) as meeting:
        for _ in range(3):
            worlds = worlds_of(meeting, SIZES)
            raised(together(*(lambda w=w: push(w) for w in worlds)))
            for world in worlds:
                world.close()
            del worlds, world
    for _ in range(50):
        gc.collect()
        after = usage()
        if after[0] <= before[0] and after[1] <= before[1] + 2:
            break
        time.sleep(0.1)
    assert after[0] <= before[0], "threads"
    assert after[1] <= before[1] + 2, "files"  # gloo's own device keeps a pair


@pytest.mark.processes
def test_a_forked_child_keeps_nothing_open(meeting: Meeting) -> None:
    world = join(meeting, "solo", 0, {"solo": 1})
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, world.over.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"was forked" in os.read(reading, 4096)
    os.close(reading)
    os.close(writing)
    assert not world.over
    world.get_group_store().set("a", "b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"side": "eval"}, "side='eval' is none of side_sizes={'a': 2}"),
        ({"side_rank": 2}, "side_rank=2 is none of the 2 ranks of side 'a'; use 0 to 1"),
        ({"side_sizes": {}}, "has 0 sides, and needs 1 to 64"),
        ({"side_sizes": {"a": 0}}, "0 is no number of ranks"),
        ({"side_sizes": {"a": None}}, "leaves out the size of this side"),
        ({"side_sizes": {"a": 1, "": 1}}, "side '' needs a name of 1 to 200 bytes"),
        ({"side_sizes": {"a": 2, "b\ud800": 1}}, "is no text, as the character at 1 is half of a surrogate pair"),
        ({"side_sizes": {"a": 2, "b" * 201: 1}}, "has 201 bytes, and the most are 200; shorten it"),
        ({"name": "n\ud800"}, "name='n\\ud800' is no text"),
        ({"name": "n" * 201}, "has 201 bytes, and the most are 200; shorten it"),
        ({"host": "h\ud800"}, "host='h\\ud800' is no text"),
        ({"address": "10.0.0.1:5"}, "is not tcp://host:port"),
        ({"address": "tcp://:5"}, "is not tcp://host:port"),
        ({"address": "tcp://a:70000"}, "is not tcp://host:port"),
        ({"secret": "short"}, "has 5 bytes and needs at least 16"),
        ({"secret": "a secret of the tests \ud83d"}, "secret has at place 22 a character that is none by itself"),
        ({"timeout_seconds": 0}, "must be a number of seconds above 0"),
        ({"device": "nowhere"}, "is not a device of torch"),
        ({"side_rank": "0"}, "side_rank must be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything(changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {
        "address": "tcp://127.0.0.1:1", "side": "a", "side_rank": 0, "side_sizes": {"a": 2}, "secret": SECRET,
        "timeout_seconds": timedelta(seconds=5),
    }  # fmt: skip
    given.update(changes)
    with pytest.raises(SpecError) as caught:
        tricomm.connect(given.pop("address"), **given)
    assert words in str(caught.value)
