"""One-shot calls that come again: they find what was made for them, and promise what each call does."""

import gc
import random
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.oracle import pick, require_equal
from tests.transport.test_identity import meet
from tests.transport.test_repeats import counting
from tricomm import Mesh, Replicate, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.resharder.repeat import Repeat
from tricomm.transport import group as of_groups
from tricomm.transport.communicator import Communicator
from tricomm.transport.group import GroupContext, context_of
from tricomm.transport.memory.nearby import Nearby

ONE = Mesh([0], ("x",))
FULL = torch.arange(16, dtype=torch.float32).reshape(4, 4)


@pytest.fixture
def context() -> Iterator[GroupContext]:
    """Of the group of one rank, the default one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield context_of(dist.group.WORLD)
    dist.destroy_process_group()


def specs(dtype: str = "float32") -> tuple[ShardingSpec, ShardingSpec]:
    return ShardingSpec(ONE, (Replicate(),), (4, 4), "float32"), ShardingSpec(ONE, (Shard(0),), dtype=dtype)


def moved(sides: tuple[ShardingSpec, ShardingSpec], **options: Any) -> torch.Tensor:
    found = tricomm.reshard(FULL, *sides, timeout_seconds=20, **options)
    assert found is not None
    assert torch.equal(found, FULL.to(found.dtype))
    return found


def test_calls_with_the_same_objects_are_found_without_a_comparison(
    context: GroupContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, others = specs(), specs("float64")
    moved(sides, name="a")
    moved(others, name="a")
    known = [*context.as_written.values()]
    monkeypatch.setattr(context, "kept", lambda *_: pytest.fail("it was looked for"))
    assert moved(sides, name="a").dtype is torch.float32
    assert moved(others, name="a").dtype is torch.float64
    assert [*context.as_written.values()] == known


def test_equal_arguments_find_the_same_and_others_do_not(context: GroupContext) -> None:
    sides = specs()
    for arguments in (sides, specs(), sides[:1] * 2, specs("float64")):
        moved(arguments)
    movers = [mover for mover, _ in context.as_written.values()]
    assert [movers.index(one) for one in movers] == [0, 0, 2, 3]
    moved(sides, name="other")
    moved(sides, channel="other")  # another option of the same value
    assert len({id(mover) for mover, _ in context.as_written.values()}) == 5


def test_a_value_of_another_type_is_refused_after_an_equal_one(context: GroupContext) -> None:
    sides = specs()
    tricomm.reshard(FULL, *sides, confirm=True)
    with pytest.raises(SpecError, match="confirm"):
        tricomm.reshard(FULL, *sides, confirm=1)  # type: ignore[call-overload]


def test_what_was_written_is_as_many_as_are_kept_and_goes_with_them(
    context: GroupContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_groups, "MAX_KEPT", 4)
    for number in range(12):
        moved(specs(), name=f"call {number}")
        assert len(context.as_written) <= 4
        assert {id(mover) for mover, _ in context.as_written.values()} <= {id(one) for one in context._kept.values()}
    context.clear()
    assert not context.as_written


def test_channels_are_as_many_as_are_kept(context: GroupContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_groups, "MAX_CHANNELS", 3)
    for number in range(8):
        for name in ("a", "b"):
            moved(specs(), name=name, channel=f"channel {number}")
        moved(specs(), channel="again and again")
        gc.collect()
        names = {name for _, _, name in context._channels}
        assert len(names) <= 3
        assert names >= {"again and again", f"channel {number}"}


def test_the_group_keeps_it_and_is_not_kept() -> None:
    sides, gone = specs(), []
    for number in range(3):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.new_group([0])
        moved(sides)
        moved(sides, group=group)
        moved(sides, group=group)
        mover = next(iter(context_of(group).as_written.values()))[0]
        gone += [weakref.ref(mover), weakref.ref(group), weakref.ref(context_of(group))]
        assert len(context_of(group).as_written) == 1
        dist.destroy_process_group(group)
        with pytest.raises(SpecError, match="was destroyed"):
            moved(sides, group=group)
        del group, mover
        dist.destroy_process_group()
        with pytest.raises(SpecError, match="there is no process group"):
            moved(sides)
        gc.collect()  # errors hold what has raised them
        assert [one() for one in gone] == [None] * 3 * (number + 1)


SIZE = 4
SHAPE = (8, 12)
ALL, FIRST, LAST = Mesh([0, 1, 2, 3], ("x",)), Mesh([0, 1], ("x",)), Mesh([2, 3], ("x",))
LAYOUTS = [
    (ShardingSpec(FIRST, (Shard(0),), SHAPE, "float32"), ShardingSpec(LAST, (Shard(1),), SHAPE, "float32")),
    (ShardingSpec(ALL, (Shard(0),), SHAPE, "float32"), ShardingSpec(ALL, (Shard(1),), SHAPE, "float32")),
    (ShardingSpec(LAST, (Shard(1),), SHAPE, "float32"), ShardingSpec(ALL, (Replicate(),), SHAPE, "float32")),
]
"""Their calls are all of the same ranks, which count them together."""


class Step(NamedTuple):
    """A call that all ranks make, and what one of them does in it."""

    layout: int
    confirm: bool
    event: str
    culprit: int


USUAL = ["", "", "", "new out", "no out", "equal layouts", "late", "very late", "in the background"]
BAD = ["refuses", "fails", "interrupted", "calls another"]


def drawn(seed: int, count: int) -> list[Step]:
    choose = random.Random(seed)

    def one() -> Step:
        event = choose.choice(BAD) if choose.random() < 0.12 else choose.choice(USUAL)
        return Step(choose.choice([0, 0, 1, 2]), choose.random() < 0.8, event, choose.randrange(SIZE))

    return [one() for _ in range(count)]


class OneShots:
    """One rank that makes calls, with the same tensors as long as nothing is said."""

    def __init__(self, rank: int, transport: str) -> None:
        self.rank, self.transport = rank, transport
        self.tensors = [self.fresh(source, destination) for source, destination in LAYOUTS]
        self.salt = self.repeats = 0

    def fresh(self, source: ShardingSpec, destination: ShardingSpec) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rank = self.rank
        shard = torch.zeros(source.local_shape(rank)) if rank in source.mesh else None
        return shard, torch.zeros(destination.local_shape(rank)) if rank in destination.mesh else None

    def call(self, step: Step) -> None:
        """Make a call, and compare what it gives."""
        self.salt += 1
        event = step.event if step.culprit == self.rank else ""
        source, destination = sides = LAYOUTS[step.layout]
        shard, out = self.tensors[step.layout]
        full = torch.arange(96, dtype=torch.float32).reshape(SHAPE) + 1000 * self.salt
        if shard is not None:
            shard.copy_(pick(full, source, self.rank))
        if out is not None:
            out.fill_(torch.nan)
        if event == "new out":
            self.tensors[step.layout] = shard, out = self.fresh(source, destination)
            if shard is not None:
                shard.copy_(pick(full, source, self.rank))
        elif event == "no out":
            out = None
        elif event == "equal layouts":
            sides = tuple(ShardingSpec(one.mesh, one.placements, SHAPE, "float32") for one in sides)  # type: ignore[assignment]
        elif event.endswith("late"):
            time.sleep(0.25 if event == "very late" else 0.02)
        options: dict[str, Any] = {"transport": self.transport, "timeout_seconds": 20}
        options |= {} if step.confirm else {"confirm": False}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Repeat, "make", counting(self, Repeat.make))
            if event == "in the background":
                moved = tricomm.reshard_async(shard, *sides, out=out, **options).wait()
            else:
                moved = tricomm.reshard(shard, *sides, out=out, **options)
        if self.rank in destination.mesh:
            require_equal(moved, pick(full, destination, self.rank), f"rank {self.rank}, {step}")
        else:
            assert moved is None

    def fail(self, step: Step) -> str:
        """Make a call in which the culprit fails; what is said of that here."""
        is_culprit = step.culprit == self.rank
        sides, (shard, out) = LAYOUTS[step.layout], self.tensors[step.layout]
        with pytest.MonkeyPatch.context() as patch:
            if is_culprit and step.event == "refuses":
                shard, out = torch.zeros(1), torch.zeros(1)
            elif is_culprit and step.event == "fails":
                patch.setattr(Communicator, "confirm", raising(KeyError("no key here")))
            elif is_culprit and step.event == "interrupted":
                patch.setattr(Nearby, "_wait", raising(KeyboardInterrupt()))
            elif is_culprit:
                another = (step.layout + 1) % len(LAYOUTS)
                sides, (shard, out) = LAYOUTS[another], self.tensors[another]
            with pytest.raises((TransportError, SpecError, KeyError, KeyboardInterrupt)) as caught:
                tricomm.reshard(shard, *sides, out=out, transport=self.transport, timeout_seconds=20)
        text = str(caught.value)
        if not is_culprit:
            assert caught.type is TransportError
        if step.event == "calls another":
            assert "disagrees" in text
        else:
            assert is_culprit or f"rank {step.culprit}" in text, text
        return text


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def made_in_turn(rank: int, steps: list[Step], transport: str) -> tuple[list[int], int]:
    """The largest tag after each step, and how many calls were repeats."""
    if rank >= SIZE:
        return [], 0
    bed, tags = OneShots(rank, transport), list[int]()
    context = context_of(dist.group.WORLD)
    for step in steps:
        if step.event in BAD and (step.event != "interrupted" or transport == "memory"):
            bed.fail(step)
        else:
            bed.call(step)
            movers = [mover for mover, _ in context.as_written.values() if mover.participants == ALL.ranks]
            tags.append(max(mover._session.tag for mover in movers))
    return tags, bed.repeats


THREE = 3
ROWS = ShardingSpec(Mesh([0, 1, 2], ("x",)), (Shard(0),), (6, 3), "float32")
COLUMNS = ShardingSpec(ROWS.mesh, (Shard(1),))
SECONDS = 6.0
"""The timeout; who is told once is never told by it."""


def told(rank: int, what: str, deed: Callable[[torch.Tensor], Any], transport: Any) -> tuple[str, str]:
    """What is said of a deed, and of the call that all make after it; of ranks that take part."""
    said, shard = ["", ""], torch.full((2, 3), float(rank))

    def after() -> None:
        found = tricomm.reshard(
            shard, ROWS, COLUMNS, name=f"after {what}", transport=transport, timeout_seconds=SECONDS
        )
        assert found is not None
        assert found.flatten().tolist() == [0, 0, 1, 1, 2, 2]

    for index, call in enumerate((partial(deed, shard), after)):
        meet(f"{what} {transport} {index}", THREE)
        try:
            call()
        except (TransportError, ZeroDivisionError, KeyboardInterrupt) as error:
            said[index] = f"{type(error).__name__}: {error}"
    return said[0], said[1]


def between_start_and_wait(rank: int, error: type[BaseException], transport: Any) -> list[tuple[str, str]]:
    """Rank 1 leaves the block between the first start, or two, and their waits."""
    if rank >= THREE:
        return []

    def deed(count: int, shard: torch.Tensor) -> None:
        options: Any = {"transport": transport, "timeout_seconds": SECONDS}
        with tricomm.Resharder(ROWS, COLUMNS, **options) as mover:
            started = [mover.start(shard) for _ in range(count if rank != 1 else 1)]
            if rank == 1:
                raise error
            for handle in started:
                handle.wait()
            mover(shard)

    return [told(rank, f"{error} {count}", partial(deed, count), transport) for count in (1, 2, 1)]


def before_hook(rank: int, starts: bool, transport: Any) -> list[tuple[str, str]]:
    """The hook of rank 1 raises in the first call."""
    if rank >= THREE:
        return []

    def before(_: str, tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor / (1 if rank != 1 else 1 // 0) for name, tensor in tensors.items()}

    def deed(shard: torch.Tensor) -> None:
        options: Any = {"transport": transport, "timeout_seconds": SECONDS, "hooks": tricomm.Hooks({"w": before})}
        with tricomm.Resharder({"w": ROWS}, {"w": COLUMNS}, **options) as mover:
            if starts:
                mover.start({"w": shard}).wait()
            else:
                mover({"w": shard})

    return [told(rank, f"hook {starts} {index}", deed, transport) for index in range(2)]


def another_call(rank: int, odd: int, transport: Any) -> list[tuple[str, str]]:
    """All but the odd one call a warm Resharder; that one, a one-shot call."""
    if rank >= THREE:
        return []
    options: Any = {"transport": transport, "timeout_seconds": SECONDS}

    def deed(mover: tricomm.Resharder[torch.Tensor], shard: torch.Tensor) -> None:
        if rank == odd:
            tricomm.reshard(shard, ROWS, COLUMNS, name="odd", **options)
        else:
            mover(shard)

    found = []
    for index in range(2):
        with tricomm.Resharder(ROWS, COLUMNS, name=f"warm {odd}", **options) as mover:
            mover(torch.ones(2, 3))
            found.append(told(rank, f"odd {odd} {index}", partial(deed, mover), transport))
    return found


def another_call_of_two(rank: int, transport: Any) -> list[tuple[str, str]]:
    """Rank 0 calls a warm Resharder, the others make a one-shot call; then all call another warm one."""
    if rank >= THREE:
        return []
    options: Any = {"transport": transport, "timeout_seconds": SECONDS, "confirm": True}
    shard, said = torch.ones(2, 3), list[str]()
    movers = [tricomm.Resharder(ROWS, COLUMNS, name=f"warm {name} of two", **options) for name in "ab"]
    for mover in movers:
        mover(shard)
    for index in range(4):
        meet(f"two {transport} {index}", THREE)
        try:
            if rank == 0 or index % 2:
                movers[index % 2](shard)
            else:
                tricomm.reshard(shard, ROWS, COLUMNS, name="two", **options)
            said.append("")
        except TransportError as error:
            said.append(str(error))
    for mover in movers:
        mover.close()
    return [(said[0], said[1]), (said[2], said[3])]


@pytest.mark.parametrize("transport", ["auto", "network"])
@pytest.mark.parametrize(
    ("story", "detail", "words"),
    [
        (between_start_and_wait, [ZeroDivisionError], "rank 1 failed in the block of Resharder number "),
        (between_start_and_wait, [KeyboardInterrupt], "rank 1 failed in the block of Resharder number "),
        (before_hook, [False], "rank 1 failed in call 1 of Resharder number 1 "),
        (before_hook, [True], "rank 1 failed in call 1 of Resharder number 1 "),
        (another_call, [1], "every rank must make the same calls in the same order"),
        (another_call, [0], "every rank must make the same calls in the same order"),
        (another_call_of_two, [], "every rank must make the same calls in the same order"),
    ],
)
def test_what_ended_a_call_is_told_once_and_the_next_call_of_all_works(
    ranks: Ranks, story: Callable[..., list[tuple[str, str]]], detail: list[Any], words: str, transport: str
) -> None:
    for rank, results in enumerate(ranks.run(story, *detail, transport)):
        for first, second in results if rank < THREE else ():
            assert words in first or first.startswith(("ZeroDivisionError", "KeyboardInterrupt")), (rank, first)
            assert second == "", (rank, first, second)


@pytest.mark.parametrize("transport", ["memory", "network"])
@pytest.mark.parametrize("seed", range(3))
def test_calls_that_come_again_and_those_that_do_not_are_one_to_the_other_ranks(
    ranks: Ranks, seed: int, transport: str
) -> None:
    found = ranks.run(made_in_turn, drawn(seed, 60), transport)[:SIZE]
    assert len({tuple(tags) for tags, _ in found}) == 1
    assert all(repeats > 3 for _, repeats in found)


def called_on_many_channels(rank: int, transport: str) -> int:
    """Calls on channels, of which each rank keeps another number, in an order that comes back; how many it has left."""
    context = context_of(dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_groups, "MAX_CHANNELS", 1 + rank)
        for number in (0, 1, 2, 0, 0, 3, 1, 2, 0, 3, 3):
            source, destination = LAYOUTS[number % len(LAYOUTS)]
            full = torch.arange(96, dtype=torch.float32).reshape(SHAPE) + number
            shard = pick(full, source, rank) if rank in source.mesh else None
            moved = tricomm.reshard(
                shard, source, destination, channel=f"number {number}", transport=transport, timeout_seconds=20
            )
            if rank in destination.mesh:
                require_equal(moved, pick(full, destination, rank), f"rank {rank}, call {number}")
        gc.collect()
        found = len([name for _, _, name in context._channels if name.startswith("number")])
    context.clear()
    return found


@pytest.mark.parametrize("transport", ["memory", "network"])
def test_a_channel_that_a_rank_has_let_go_connects_again(ranks: Ranks, transport: str) -> None:
    found = ranks.run(called_on_many_channels, transport)[:SIZE]
    assert all(count <= 1 + rank for rank, count in enumerate(found)), found
