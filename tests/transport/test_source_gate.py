"""When the tensors of a background run may change: once all of this rank is sent, whatever others still do."""

import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tricomm import Mesh, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.transport.channel import Channel
from tricomm.transport.coordination.rendezvous import Rendezvous
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


def test_an_interrupt_as_a_call_ends_does_not_keep_the_channel(mover: Resharder) -> None:
    def interrupt(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is Session.__exit__.__code__:
            sys.settrace(None)
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            mover(torch.zeros(4, 4))
    finally:
        sys.settrace(before)
    assert torch.equal(mover(torch.ones(4, 4)), torch.ones(4, 4))


def test_a_call_within_a_call_is_refused(mover: Resharder) -> None:
    assert mover._session is not None
    with mover._session, pytest.raises(SpecError, match="two threads of rank 0 call at once"):
        mover(torch.zeros(4, 4))
    assert torch.equal(mover(torch.ones(4, 4)), torch.ones(4, 4))


def test_connecting_has_what_the_meeting_has_left_of_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    join, connected = Rendezvous.join, Channel._connected

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return join(*arguments)

    def noted(channel: Channel, generation: int, call: str, seconds: float, *has: Any) -> Any:
        found.append(seconds)
        return connected(channel, generation, call, seconds, *has)

    monkeypatch.setattr(Rendezvous, "join", slow)
    monkeypatch.setattr(Channel, "_connected", noted)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for seconds in (10.0, 0.2):
        with Resharder(ROWS, ROWS, channel=str(seconds), timeout_seconds=seconds) as made:
            made.connect()
    dist.destroy_process_group()
    assert 1.0 <= found[0] <= 9.7
    assert found[1] == pytest.approx(0.02), "some is left for who came at the last moment"


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
    monkeypatch.setattr(communicator, "is_past", lambda *_: True)
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
