"""Ranks that die, stop, stay away, disagree or refuse: every other rank gets an error that names them, in time."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.oracle import pick, require_equal
from tricomm import Mesh, Partial, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.transport.communicator import Communicator

pytestmark = pytest.mark.processes
SIZE = 5
TIMEOUT_SECONDS = 4.0
SHAPE = (512, 4096)
SOURCE = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), SHAPE, "float32")
COLUMNS = ShardingSpec(Mesh([2, 3, 4], ("x",)), (Shard(1),), SHAPE, "float32")
COPIES = ShardingSpec(Mesh([2, 3, 4], ("x",)), (Replicate(),), SHAPE, "float32")
# In several rounds, so that there is a middle to die in.
STRATEGIES = {"unicast": tricomm.SendRecv(1 << 16), "chain": tricomm.Broadcast(1 << 16)}
DESTINATIONS = {"unicast": COLUMNS, "chain": COPIES}


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    """Five ranks of which one will not survive."""
    with Ranks(SIZE, timeout_seconds=30) as started:
        yield started


@pytest.fixture(scope="module")
def five() -> Iterator[Ranks]:
    """Five ranks that survive: each test also shows that the group works after the failures before it."""
    with Ranks(SIZE, timeout_seconds=30) as started:
        yield started


def full_tensor() -> torch.Tensor:
    return torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE)


def shard_of(rank: int) -> torch.Tensor | None:
    return pick(full_tensor(), SOURCE, rank) if rank in SOURCE.mesh else None


def attempt(rank: int, call: Callable[[], Any]) -> tuple[str, str, float]:
    """(kind of error or "returned", its text, seconds) of a call."""
    began = time.monotonic()
    try:
        call()
    except tricomm.TricommError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "returned", "", time.monotonic() - began


def in_the_middle(deed: Callable[[], None], after: int) -> None:
    """Do the deed after some operations have been posted."""
    post = Communicator.post
    count = 0

    def counting(communicator: Communicator, operations: Any) -> Any:
        def watched() -> Iterator[Any]:
            nonlocal count
            for operation in operations:
                count += 1
                if count == after:
                    deed()
                yield operation

        return post(communicator, watched())

    Communicator.post = counting  # type: ignore[method-assign]


def signal_me(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail_in_the_middle(rank: int, victim: int, number: int, kind: str, confirm: bool) -> tuple[str, str, float]:
    """A first call that works, then one in which the victim gets a signal."""
    mover = Resharder(
        SOURCE, DESTINATIONS[kind], strategy=STRATEGIES[kind], timeout_seconds=TIMEOUT_SECONDS, confirm=confirm
    )
    shard = shard_of(rank)
    mover(shard)
    if rank == victim:
        in_the_middle(signal_me(number), after=7)
    outcome = attempt(rank, lambda: mover(shard))
    if shard is not None:
        require_equal(shard, shard_of(rank), f"source of rank {rank}")
    return outcome


def require_all_blame(outcomes: list[tuple[str, str, float]], others: list[int], victim: int) -> None:
    for rank, (kind, text, seconds) in zip(others, outcomes, strict=True):
        assert kind == "TransportError", f"rank {rank}: {kind} {text}"
        assert f"rank {victim} " in text.split(";")[0], f"rank {rank}: {text}"
        assert seconds <= TIMEOUT_SECONDS, f"rank {rank} took {seconds}"


@pytest.mark.parametrize("kind", ["unicast", "chain"])
@pytest.mark.parametrize("victim", [1, 3])
def test_a_rank_killed_in_the_middle_is_named_by_every_other(doomed: Ranks, victim: int, kind: str) -> None:
    doomed.start(fail_in_the_middle, victim, signal.SIGKILL, kind, True)
    others = [rank for rank in range(SIZE) if rank != victim]
    outcomes = doomed.collect(others)
    require_all_blame(outcomes, others, victim)
    assert max(seconds for _, _, seconds in outcomes) < TIMEOUT_SECONDS / 2, "a death is known at once"


@pytest.mark.parametrize("kind", ["unicast", "chain"])
def test_a_rank_stopped_in_the_middle_is_named_by_every_other(doomed: Ranks, kind: str) -> None:
    victim = 3
    doomed.start(fail_in_the_middle, victim, signal.SIGSTOP, kind, True)
    others = [rank for rank in range(SIZE) if rank != victim]
    require_all_blame(doomed.collect(others), others, victim)


def stay_away(rank: int, victim: int, first: bool, one_shot: bool, name: str) -> tuple[str, str, float]:
    """The victim is late for the first call, or comes to the first and is late for the second."""
    options = {"timeout_seconds": TIMEOUT_SECONDS, "name": name}

    def call() -> None:
        if one_shot:
            tricomm.reshard(shard_of(rank), SOURCE, COLUMNS, **options)
        else:
            mover(shard_of(rank))

    mover = None if one_shot else Resharder(SOURCE, COLUMNS, confirm=True, **options)
    if not first:
        call()
    if rank == victim:
        time.sleep(TIMEOUT_SECONDS + 0.5)
    outcome = attempt(rank, call)
    call()
    return outcome


@pytest.mark.parametrize(
    ("victim", "first", "one_shot", "name"),
    [(0, True, True, ""), (4, True, False, "layer 3"), (4, False, True, "layer 3"), (0, False, False, "")],
    ids=["reshard", "Resharder", "reshard again", "Resharder again"],
)
def test_a_rank_that_never_calls_is_named_by_every_other_and_told_when_it_comes(
    five: Ranks, victim: int, first: bool, one_shot: bool, name: str
) -> None:
    """In the same words on all ranks, and itself also which one it is."""
    outcomes = five.run(stay_away, victim, first, one_shot, name)
    require_all_blame(outcomes, list(range(SIZE)), victim)
    (said,) = {text for rank, (_, text, _) in enumerate(outcomes) if rank != victim}
    assert outcomes[victim][1] == (
        f"{said}; this is rank {victim}, which came to that call when the others had given it up; call again on all "
        "ranks"
    )
    assert name in said


def skip_some(rank: int, skipped: int, kind: str) -> list[tuple[str, str, float]]:
    """Rank 2 leaves out some calls; then all make the same calls, each after the one before has ended everywhere."""
    options: dict[str, Any] = {"timeout_seconds": TIMEOUT_SECONDS}
    mover = Resharder(SOURCE, COLUMNS, confirm=kind == "confirmed", **options)

    def call(step: int) -> None:
        if kind.startswith("reshard"):
            name = f"step {step}" if kind == "reshard named" else ""
            output = tricomm.reshard(shard_of(rank), SOURCE, COLUMNS, name=name, **options)
        else:
            output = mover(shard_of(rank))
        if rank in COLUMNS.mesh:
            require_equal(output, pick(full_tensor(), COLUMNS, rank), f"rank {rank}")

    call(0)
    dist.barrier()
    for step in range(skipped):
        if rank != 2:
            kinds = attempt(rank, lambda step=step: call(1 + step))[0]
            assert kinds == "TransportError" or (kind == "warm" and rank > 2)  # has no part in what rank 2 sends
        dist.barrier()
    outcomes = []
    for step in range(5):
        outcomes.append(attempt(rank, lambda step=step: call(1 + skipped + step)))
        dist.barrier()
    return outcomes


@pytest.mark.parametrize(
    ("kind", "skipped"), [("reshard", 1), ("reshard", 2), ("confirmed", 1), ("confirmed", 2), ("warm", 1), ("warm", 2)]
)
def test_ranks_of_which_one_skipped_calls_come_together_again(five: Ranks, kind: str, skipped: int) -> None:
    """Told the first time, rank 2 might have been late only; the second time it ends the call that others wait in, and
    all count their calls anew.
    """
    for rank, outcomes in enumerate(five.run(skip_some, skipped, kind)):
        kinds = [one for one, _, _ in outcomes]
        assert kinds == ["TransportError", "TransportError", *["returned"] * 3], f"rank {rank}: {outcomes}"
        _, text, seconds = outcomes[1]
        assert "rank 2 is one call behind the others, and ends this one to catch up; call again on all ranks" in text
        assert seconds < TIMEOUT_SECONDS / 2, f"rank {rank} waited {seconds} s"


@pytest.mark.parametrize("skipped", [1, 2])
def test_calls_that_say_what_they_are_for_come_together_at_once(five: Ranks, skipped: int) -> None:
    """By its name rank 2 knows that the call which the others gave up is not the one that it makes."""
    for rank, outcomes in enumerate(five.run(skip_some, skipped, "reshard named")):
        assert [one for one, _, _ in outcomes] == ["returned"] * 5, f"rank {rank}: {outcomes}"


def miscount(rank: int) -> list[tuple[str, str, float]]:
    """Rank 1 refuses two calls of its own before all call again and again."""
    mover = Resharder(SOURCE, COLUMNS, timeout_seconds=TIMEOUT_SECONDS, confirm=True)
    mover(shard_of(rank))
    dist.barrier()
    if rank == 1:
        for _ in range(2):
            assert attempt(rank, lambda: mover(torch.zeros(3)))[0] == "SpecError"
    dist.barrier()
    outcomes = []
    for _ in range(7):
        outcomes.append(attempt(rank, lambda: mover(shard_of(rank))))
        dist.barrier()
    return outcomes


def test_ranks_that_differ_in_the_number_of_a_call_say_so_once(five: Ranks) -> None:
    for rank, outcomes in enumerate(five.run(miscount)):
        assert [one for one, _, _ in outcomes[-2:]] == ["returned"] * 2, f"rank {rank}: {outcomes}"
        assert sum("count anew from here" in text for _, text, _ in outcomes) == 1


def disagree(rank: int, dissenters: dict[int, dict[str, Any]]) -> tuple[str, str, float]:
    """Some ranks change an argument; afterwards all make one good call."""
    arguments: dict[str, Any] = {"source": SOURCE, "destination": COLUMNS, **dissenters.get(rank, {})}
    tensor = shard_of(rank)
    if tensor is not None and rank in arguments["source"].mesh:
        tensor = pick(full_tensor(), arguments["source"], rank)
    outcome = attempt(rank, lambda: tricomm.reshard(tensor, timeout_seconds=TIMEOUT_SECONDS, **arguments))
    output = tricomm.reshard(shard_of(rank), SOURCE, COLUMNS, timeout_seconds=TIMEOUT_SECONDS)
    if rank in COLUMNS.mesh:
        require_equal(output, pick(full_tensor(), COLUMNS, rank), f"rank {rank} after the disagreement")
    return outcome


DISAGREEMENTS = {
    "destination placements": ({3: {"destination": COPIES}}, "rank 3 disagrees with rank 0"),
    "strategy": ({0: {"strategy": tricomm.SendRecv()}}, "rank 1 disagrees with rank 0"),
    "destination dtype": (
        {rank: {"destination": ShardingSpec(COLUMNS.mesh, (Shard(1),), SHAPE, "bfloat16")} for rank in (2, 4)},
        "rank 2 disagrees with rank 0",
    ),
}


@pytest.mark.parametrize("field", ["destination placements", "strategy", "destination dtype"])
def test_ranks_that_disagree_all_name_the_first_and_the_field(five: Ranks, field: str) -> None:
    dissenters, claim = DISAGREEMENTS[field]
    for rank, (kind, text, seconds) in enumerate(five.run(disagree, dissenters)):
        assert kind == "TransportError", f"rank {rank}: {kind} {text}"
        assert text.startswith(f"{claim} about {field}: "), f"rank {rank}: {text}"
        assert "every rank must make the same call" in text
        assert seconds < TIMEOUT_SECONDS / 2


def different_meshes(rank: int) -> tuple[str, str, float]:
    """Rank 2 thinks that the destination is on ranks 2 and 3 only, so it does not even wait for rank 4."""
    mesh = Mesh([2, 3], ("x",)) if rank == 2 else COLUMNS.mesh
    destination = ShardingSpec(mesh, (Shard(1),), SHAPE, "float32")
    return attempt(rank, lambda: tricomm.reshard(shard_of(rank), SOURCE, destination, timeout_seconds=TIMEOUT_SECONDS))


def test_ranks_with_different_meshes_do_not_hang(five: Ranks) -> None:
    for rank, (kind, text, seconds) in enumerate(five.run(different_meshes)):
        assert kind == "TransportError", f"rank {rank}: {kind} {text}"
        assert text.startswith("rank 2 disagrees with rank 0 about destination mesh: "), f"rank {rank}: {text}"
        assert seconds < TIMEOUT_SECONDS


def refuse(rank: int, warm: bool) -> tuple[str, str, float]:
    """Rank 1 passes a tensor of the wrong shape."""
    mover = Resharder(SOURCE, COLUMNS, timeout_seconds=TIMEOUT_SECONDS, confirm=True)
    if warm:
        mover(shard_of(rank))
    tensor = shard_of(rank)
    if rank == 1:
        assert tensor is not None
        tensor = tensor[:-1]
    outcome = attempt(rank, lambda: mover(tensor))
    output = mover(shard_of(rank))
    if rank in COLUMNS.mesh:
        require_equal(output, pick(full_tensor(), COLUMNS, rank), f"rank {rank} after the refusal")
    return outcome


@pytest.mark.parametrize("warm", [False, True])
def test_a_rank_that_refuses_its_tensor_tells_the_others(five: Ranks, warm: bool) -> None:
    outcomes = five.run(refuse, warm)
    kind, text, _ = outcomes[1]
    assert kind == "SpecError"
    assert "shape (255, 4096)" in text
    others = [rank for rank in range(SIZE) if rank != 1]
    require_all_blame([outcomes[rank] for rank in others], others, 1)
    assert all("refused" in outcomes[rank][1] and "(255, 4096)" in outcomes[rank][1] for rank in others)


def wrong_arguments(rank: int) -> list[str]:
    """Every rank makes the same mistake; each gets a SpecError and nobody waits. Then a good call works."""
    outside = ShardingSpec(Mesh([2, 9], ("x",)), (Shard(1),))
    partial = ShardingSpec(COLUMNS.mesh, (Partial(),))
    other_shape = ShardingSpec(COLUMNS.mesh, (Shard(1),), (512, 4095))
    texts = []
    for destination in (outside, partial, other_shape):
        with pytest.raises(SpecError) as caught:
            tricomm.reshard(shard_of(rank), SOURCE, destination, timeout_seconds=TIMEOUT_SECONDS)
        texts.append(str(caught.value))
    tensor = shard_of(rank)
    mistaken = torch.zeros(3) if tensor is None else None
    with pytest.raises(SpecError) as caught:
        tricomm.reshard(mistaken, SOURCE, COLUMNS, timeout_seconds=TIMEOUT_SECONDS)
    texts.append(str(caught.value))
    output = tricomm.reshard(tensor, SOURCE, COLUMNS, timeout_seconds=TIMEOUT_SECONDS)
    if rank in COLUMNS.mesh:
        require_equal(output, pick(full_tensor(), COLUMNS, rank), f"rank {rank}")
    return texts


def test_mistakes_are_refused_before_anything_is_sent(five: Ranks) -> None:
    for rank, texts in enumerate(five.run(wrong_arguments)):
        assert "rank 9" in texts[0]
        assert "ranks 0 to 4" in texts[0]
        assert "Partial" in texts[1]
        assert "(512, 4095)" in texts[2]
        missing = "gave no tensor; pass its shard" in texts[3]
        unexpected = "not on the source mesh" in texts[3]
        assert missing if rank in SOURCE.mesh else unexpected


def interrupted(rank: int, times: int) -> list[tuple[str, str, float]]:
    """Rank 3 runs out of memory, so to say, at its first operation, when others may not have begun; many times."""
    mover = Resharder(SOURCE, COLUMNS, strategy=STRATEGIES["unicast"], timeout_seconds=TIMEOUT_SECONDS, confirm=True)
    outcomes = []
    post = Communicator.post

    def failing(communicator: Communicator, operations: Any) -> Any:
        raise MemoryError("no more")

    for _ in range(times):
        if rank == 3:
            Communicator.post = failing  # type: ignore[method-assign]
        try:
            outcomes.append(attempt(rank, lambda: mover(shard_of(rank))))
        except MemoryError as error:
            outcomes.append(("MemoryError", str(error), 0.0))
        finally:
            Communicator.post = post  # type: ignore[method-assign]
    output = mover(shard_of(rank))
    if rank in COLUMNS.mesh:
        require_equal(output, pick(full_tensor(), COLUMNS, rank), f"rank {rank} after the failures")
    return outcomes


def test_an_exception_in_the_middle_reaches_the_others(five: Ranks) -> None:
    of_ranks = five.run(interrupted, 8)
    others = [0, 1, 2, 4]
    for outcomes in zip(*of_ranks, strict=True):
        assert outcomes[3][0] == "MemoryError"
        require_all_blame([outcomes[rank] for rank in others], others, 3)
        assert all("no more" in outcomes[rank][1] for rank in others)


def test_without_a_process_group_the_error_says_what_to_do() -> None:
    with pytest.raises(SpecError, match=r"init_process_group.*LocalTransport"):
        tricomm.reshard(None, SOURCE, COLUMNS)
    with pytest.raises(TransportError):
        raise TransportError("is a RuntimeError") from None


def lose_the_store(rank: int, port: int, kind: str, is_idle: bool) -> tuple[str, str, float]:
    """Rank 0 holds the store of the group, as without a launcher, and is killed in a call or before it."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    mover = Resharder(
        SOURCE, DESTINATIONS[kind], strategy=STRATEGIES[kind], timeout_seconds=TIMEOUT_SECONDS, confirm=True
    )
    mover(shard_of(rank))
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL) if is_idle else in_the_middle(signal_me(signal.SIGKILL), after=7)
    return attempt(rank, lambda: mover(shard_of(rank)))


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize("kind", ["unicast", "chain"])
def test_a_killed_rank_with_the_store_is_blamed_and_no_survivor_is(doomed: Ranks, kind: str, is_idle: bool) -> None:
    """Survivors close their connections to each other, so that one may see another's close before that of rank 0."""
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    doomed.start(lose_the_store, port, kind, is_idle)
    for told, text, seconds in doomed.collect([1, 2, 3, 4]):
        assert told == "TransportError"
        assert seconds <= TIMEOUT_SECONDS
        assert text.count("store cannot be reached") == 1, text
        assert text.count("usually rank 0 or its launcher, has died") == 1, text
        assert not any(f"rank {rank} {word}" in text for rank in (1, 2, 3, 4) for word in ("failed", "died")), text
