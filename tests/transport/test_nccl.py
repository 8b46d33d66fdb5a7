"""What is asked of NCCL, by a backend that writes it down: this torch may have none, and there is no GPU."""

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tricomm import TransportError
from tricomm.transport import nccl
from tricomm.transport.accelerator import CUDA
from tricomm.transport.base import Operation
from tricomm.transport.communicator import Communicator
from tricomm.transport.coordination.run import Place, Run
from tricomm.transport.coordination.status import StatusStore
from tricomm.transport.device.subgroups import Subgroups
from tricomm.transport.group import default_device, device_of

DEVICE = torch.device("cuda", 1)


class Backend:
    """ProcessGroupNCCL, as far as it is used. Sends to ``lost`` raise."""

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self._timeout: timedelta | None = None

    def __init__(self, store: Any = None, rank: int = 0, size: int = 2, options: Any = None) -> None:
        self.options = options
        self.lines: list[str] = []
        self.depth = 0
        self.lost: int | None = None
        self.ends_badly = False

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.lines.append(f"connect {device}")

    def _start_coalescing(self) -> None:
        self.lines.append("start")
        self.depth += 1

    def _end_coalescing(self) -> str:
        self.lines.append("end")
        self.depth -= 1
        if self.ends_badly:
            raise RuntimeError("NCCL error: remote process exited")
        return "work"

    def _group_end(self) -> None:
        """Of torch: raises where no group is open."""
        if not self.depth:
            raise RuntimeError("NCCL error: invalid usage")
        self.depth -= 1

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.lines.append(f"send {tensors[0].numel()} to {peer}")
        if peer == self.lost:
            raise RuntimeError("NCCL error: invalid usage")

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.lines.append(f"recv {tensors[0].numel()} from {peer}")

    def abort(self) -> None:
        self.lines.append("abort")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """One with a device that may be entered, which it notes."""
    found = Backend()

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        found.lines.append(f"enter {device}")
        yield
        found.lines.append(f"leave {device}")

    monkeypatch.setattr(torch.cuda, "device", entered)
    return found


def operations() -> list[Operation]:
    return [Operation(peer != 5, peer, torch.zeros(peer, dtype=torch.uint8)) for peer in (5, 7, 9)]


INDEX = {5: 0, 7: 1, 9: 2}


def test_a_communicator_stands_before_anything_is_sent_and_has_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Backend, raising=False)
    backend = nccl.connect(CUDA, dist.HashStore(), 0, 2, DEVICE, timedelta(seconds=7))
    assert backend.lines == ["connect cuda:1"], "no collective, whose buffers would stay"
    assert backend.options.is_high_priority_stream
    assert backend.options._timeout == timedelta(seconds=7)


def test_a_round_is_one_group_on_its_device(backend: Backend) -> None:
    assert nccl.post_group(CUDA, backend, DEVICE, INDEX, operations()) == "work"
    calls = ["start", "recv 5 from 0", "send 7 to 1", "send 9 to 2", "end"]
    assert backend.lines == ["enter cuda:1", *calls, "leave cuda:1"]


def connected(backend: Backend, rank: int, store: Any) -> Communicator:
    """A communicator on a device that is not there."""
    coordinator = SimpleNamespace(
        rank=rank, status=StatusStore(store, rank), monitor=SimpleNamespace(watched=None), dead={}
    )
    communicator = Communicator(coordinator, tuple(INDEX), "communicator/x", 1, torch.device("cpu"))
    communicator.call = communicator.run = Run(3, 2, "Resharder 'a'", Place.of("communicator/x/1", 5.0))
    connections = object.__new__(nccl.NcclConnections)
    connections._accelerator, connections._index, connections.device = CUDA, INDEX, DEVICE
    connections.backend, connections._runs = backend, SimpleNamespace(last=object.__new__(nccl.DeviceRun))
    connections._backends, connections._order = [backend], None
    connections._subgroups = Subgroups(rank, tuple(INDEX), backend)
    connections._release = weakref.finalize(connections, int)
    communicator.connections = connections
    return communicator


def test_a_process_that_ends_begins_no_thread_to_abort(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 refuses to, in what is called at the end of a process."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    communicator = connected(backend, 5, dist.HashStore())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert str(communicator.abort("the process of rank 5 ended")) == "the process of rank 5 ended"


@pytest.mark.parametrize("how", ["in the middle", "at the end"])
def test_a_group_that_fails_is_closed_and_everybody_is_told(backend: Backend, how: str) -> None:
    """An open group would keep this thread's later calls, of any communicator, from ever starting."""
    store = dist.HashStore()
    communicator = connected(backend, 5, store)
    if how == "in the middle":
        backend.lost = 1
    else:
        backend.ends_badly = True
    rule = r"rank 5 could not queue its messages to and from ranks \[5, 7, 9\] in call 2 of Resharder 'a': NCCL error: "
    with pytest.raises(TransportError, match=rule) as caught:
        communicator.post(operations())
    assert backend.depth == 0
    deadline = time.monotonic() + 5
    while backend.lines[-1] != "abort" and time.monotonic() < deadline:
        time.sleep(0.001)
    assert backend.lines[-1] == "abort", "whoever waits for it is woken, by another thread"
    reason = StatusStore(store, 7).abort_of(communicator.place)
    assert communicator.abort_reason == reason
    assert reason is not None
    assert (reason.text, reason.tag, reason.call) == (str(caught.value), 3, 2)


def test_an_error_that_closing_the_group_raises_does_not_hide_the_first(backend: Backend) -> None:
    backend.lost, backend.ends_badly = 1, True
    with pytest.raises(RuntimeError, match="invalid usage"):
        nccl.post_group(CUDA, backend, DEVICE, INDEX, operations())
    assert backend.depth == 0


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("undefined", "cpu:gloo,cuda:nccl", "cuda:1"),  # init_process_group() without a backend
        ("nccl", "cuda:nccl", "cuda:1"),
        ("gloo", "cpu:gloo,cuda:gloo", "cpu"),
        ("undefined", "cpu:gloo", "cpu"),
    ],
)
def test_tensors_are_expected_where_the_group_has_nccl(
    name: str, config: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda _: name)
    monkeypatch.setattr(dist, "get_backend_config", lambda _: config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert default_device(None) == torch.device(expected)
    assert device_of(None, None) == torch.device(expected)


def test_a_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors have one, and so have communicators."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of("cuda", None) == DEVICE
    assert device_of("cuda:0", None) == torch.device("cuda", 0)
    assert device_of("cpu", None) == torch.device("cpu")


class Untagged:
    """Connections without tags, to a rank that confirms some call."""

    depth, has_tags = (0, 2), False

    def __init__(self, tag: int, call: int) -> None:
        self.confirmed = torch.tensor([tag, call]).view(torch.uint8)
        self.is_aborted = False

    def post(self, operations: Any, tag: int) -> list[tuple[int, Any]]:
        found = list(operations)
        for operation in found:
            if not operation.is_send:
                operation.buffer.copy_(self.confirmed)
        return [(operation.peer, None) for operation in found]

    def wait(self, work: Any, limit: timedelta) -> None:
        assert work is None

    def join(self, is_aborted: Any) -> None:
        assert not is_aborted()

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize(
    ("tag", "call", "told"),
    [(3, 2, ""), (4, 2, r"call 2 of another Resharder \(of tag 4\)"), (3, 9, "call 9 of the same Resharder")],
)
def test_without_tags_the_ranks_confirm_the_same_call(backend: Backend, tag: int, call: int, told: str) -> None:
    communicator = connected(backend, 5, dist.HashStore())
    communicator.participants = (5, 7)
    communicator.connections = connections = Untagged(tag, call)
    if told:
        with pytest.raises(TransportError, match=f"rank 5 is in call 2 of Resharder 'a', and rank 7 in {told}"):
            communicator.confirm()
    else:
        communicator.confirm()
    assert connections.is_aborted == bool(told)
