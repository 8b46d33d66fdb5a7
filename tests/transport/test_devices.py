"""A device on which nothing can be moved here is refused where it is named, before anybody waits for anybody."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
import tricomm.pipeline as pl
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec, SpecError
from tricomm.pipeline.torch_adapter import ReshardStage

ONE = Mesh([0], ("x",))
WHOLE = ShardingSpec(ONE, (Replicate(),), (4, 4), "float32")
ROWS = ShardingSpec(ONE, (Shard(0),))
FULL = torch.ones(4, 4)
ABSENT = ["meta", "xpu", "mps", "xla", "vulkan", "lazy", "hpu", torch.device("meta")]


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def connect(device: Any) -> None:
    with tricomm.Meeting("tcp://127.0.0.1:0", secret="a secret of the tests") as meeting:
        options = {"secret": "a secret of the tests", "timeout_seconds": 5, "device": device}
        tricomm.connect(meeting.address, side="a", side_rank=0, side_sizes={"a": 1}, **options).close()


def execute(device: Any) -> None:
    stages = [pl.Stage(ONE, ("x",), ("loss",), torch.nn.Identity(), loss=(tricomm.Partial("avg"),))]
    pl.Executor(pl.gpipe(1, 1), stages, {}, device=device)


# Wherever a user names a device.
CALLS: dict[str, Callable[[Any], Any]] = {
    "reshard": lambda device: tricomm.reshard(FULL, WHOLE, ROWS, device=device),
    "reshard_async": lambda device: tricomm.reshard_async(FULL, WHOLE, ROWS, device=device),
    "Resharder": lambda device: Resharder(WHOLE, ROWS, device=device),
    "Link": lambda device: pl.Link("0-1", [pl.EdgeTensor(WHOLE, ROWS)], microbatches=1, device=device),
    "Executor": execute,
    "ReshardStage": lambda device: ReshardStage(torch.nn.Identity(), 0, 1, device),
    "connect": connect,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_device_that_has_no_memory_to_move_is_refused_at_the_door(name: str) -> None:
    for device in ABSENT:
        with pytest.raises(SpecError, match=f"^device='{device}' has no memory that tricomm can move; write \"cpu\""):
            CALLS[name](device)


@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", "cuda:9"):
        with pytest.raises(SpecError, match=f"^device='{device}', and torch finds no CUDA device here; write \"cpu\""):
            CALLS[name](device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SpecError, match=r"'cuda:9', and torch finds 2 CUDA devices here; write cuda:0 to cuda:1"):
        CALLS[name]("cuda:9")


def test_a_group_that_was_destroyed_is_refused_and_one_that_torch_never_knew_is_not() -> None:
    group = dist.new_group([0])
    assert torch.equal(tricomm.reshard(FULL, WHOLE, ROWS, group=group), FULL)
    dist.destroy_process_group(group)
    for call in (lambda: tricomm.reshard(FULL, WHOLE, ROWS, group=group), lambda: Resharder(WHOLE, ROWS, group=group)):
        with pytest.raises(SpecError, match=r"was destroyed.*pass one that is there, on all of its ranks"):
            call()
    own = dist.ProcessGroup(dist.HashStore(), 0, 1)
    assert torch.equal(tricomm.reshard(FULL, WHOLE, ROWS, group=own, device="cpu"), FULL)


def test_host_memory_is_host_memory_whatever_its_index() -> None:
    assert torch.equal(tricomm.reshard(FULL, WHOLE, ROWS, device="cpu:0"), FULL)


def test_an_option_of_the_wrong_kind_is_refused_after_an_equal_one_that_was_right() -> None:
    assert torch.equal(tricomm.reshard(FULL, WHOLE, ROWS, confirm=True, timeout_seconds=20.0), FULL)
    with pytest.raises(tricomm.ArgumentError, match="confirm=1 is no truth value"):
        tricomm.reshard(FULL, WHOLE, ROWS, confirm=1, timeout_seconds=20.0)  # type: ignore[call-overload]
    assert torch.equal(tricomm.reshard(FULL, WHOLE, ROWS, confirm=True, timeout_seconds=20), FULL)
