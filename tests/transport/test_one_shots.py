"""One-shot calls that come again: they find what was made for them, and no call finds what is another's."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
from tricomm import Mesh, Replicate, Shard, ShardingSpec, SpecError
from tricomm.transport import group as of_groups
from tricomm.transport.group import GroupContext, context_of

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
