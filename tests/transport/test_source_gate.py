"""When the tensors of a background run may change: once all of this rank is sent, whatever others still do."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tricomm import Mesh, Resharder, Shard, ShardingSpec, TransportError
from tricomm.transport.handle import Handle, SourceGate
from tricomm.transport.session import Session

ROWS = ShardingSpec(Mesh([0], ("x",)), (Shard(0),), (4, 4), "float32")


@pytest.fixture
def mover() -> Iterator[Resharder]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with Resharder(ROWS, ROWS, confirm=True, timeout_seconds=10) as made:
        made(torch.zeros(4, 4))
        yield made
    dist.destroy_process_group()


def test_a_gate_that_nobody_went_through_closes_again() -> None:
    gate = SourceGate(lambda: "sent")
    gate.open()
    assert gate.take_back()
    began = threading.Event()
    told: list[Any] = []

    def wait() -> None:
        began.set()
        told.append(gate.wait())

    thread = threading.Thread(target=wait)
    thread.start()
    assert began.wait(5)
    time.sleep(0.05)
    assert told == [], "it is closed"
    gate.open()
    thread.join(5)
    assert told == ["sent"]
    assert not gate.take_back(), "somebody went through"


def test_a_gate_opens_when_the_run_ends_badly() -> None:
    gate = SourceGate(lambda: "sent")
    gate.end()
    assert gate.wait() is None


def failing_once(monkeypatch: pytest.MonkeyPatch, mover: Resharder, hold: threading.Event) -> list[int]:
    """The first attempt of the next run fails, for an earlier call as it seems, when all has been sent."""
    attempts: list[int] = []
    real = Session._carry_out

    def carry_out(session: Session, *arguments: Any) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            arguments[-1].open()
            assert hold.wait(5)
            raise TransportError("an earlier call failed")
        real(session, *arguments)

    monkeypatch.setattr(Session, "_carry_out", carry_out)
    assert mover._session is not None
    communicator = mover._session.communicator
    monkeypatch.setattr(communicator, "is_past", lambda: True)
    return attempts


def start(mover: Resharder, tensor: torch.Tensor) -> Handle:
    return mover.start(tensor, out=torch.zeros(4, 4))


def test_a_run_is_made_again_while_its_tensors_stand(monkeypatch: pytest.MonkeyPatch, mover: Resharder) -> None:
    hold = threading.Event()
    attempts = failing_once(monkeypatch, mover, hold)
    handle = start(mover, torch.ones(4, 4))
    hold.set()
    found = handle.wait()
    assert found is not None
    assert found.sum() == 16
    assert len(attempts) == 2


def test_a_run_is_not_made_again_with_tensors_that_may_have_changed(
    monkeypatch: pytest.MonkeyPatch, mover: Resharder
) -> None:
    """What it sent then would be of two versions, and count as one."""
    hold = threading.Event()
    attempts = failing_once(monkeypatch, mover, hold)
    tensor = torch.ones(4, 4)
    handle = start(mover, tensor)
    handle.wait_source()
    tensor.zero_()
    hold.set()
    with pytest.raises(TransportError, match=r"an earlier call failed; rank 0 cannot repeat its call, as its"):
        handle.wait()
    assert len(attempts) == 1
    monkeypatch.undo()
    assert mover(torch.ones(4, 4)).sum() == 16, "the next call works"
