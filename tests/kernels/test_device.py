"""What a table does on a device, on a device that is not there: memory is the host's, and launches are interpreted."""

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.kernels.interpreted import int64, interpreted
from tests.oracle import require_equal
from tricomm.kernels import device as device_module
from tricomm.kernels import layout, reference
from tricomm.kernels import pack as pack_module
from tricomm.kernels.boxes import boxes_in_order
from tricomm.kernels.pack import Table, pack, unpack
from tricomm.kernels.variants import Variant


class Stream(NamedTuple):
    cuda_stream: int
    waited: list[int]

    def wait_event(self, event: "Event") -> None:
        self.waited.append(event.after)


class Event:
    """Comes after what was done on a stream."""

    after: int

    def record(self, stream: Stream) -> None:
        self.after = stream.cuda_stream


class Log:
    """What happened: grids of launches, uploads, and tensors recorded on streams."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.uploads = 0
        self.recorded: list[tuple[int, int]] = []
        self.stream = Stream(7, [])
        self.captures = False


def from_address(address: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address)))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log()

    def compiled(variant: Variant, target: Any, index: int) -> dict[tuple[int, ...], Callable[..., None]]:
        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def run(
                    rows: Any,
                    tiles: int,
                    magic: int,
                    shift: int,
                    read_base: int,
                    write_base: int,
                    count: int,
                    *constants: Any,
                    stream: int,
                ) -> None:
                    arguments = (magic, shift, int64(read_base), int64(write_base), count, *constants)
                    assert stream == found.stream.cuda_stream
                    assert tiles % 16 == 0
                    found.grids.append(grid)
                    if isinstance(rows, tuple):
                        boxes = count // rows[layout.FIRST_TILE]
                        variant.kernel(interpreted())[grid](rows, from_address(tiles, 4 * boxes), *arguments)
                        return
                    assert rows % 16 == 0
                    of_tiles = from_address(tiles, count)
                    of_rows = from_address(rows, (int(of_tiles.max()) + 1) * 32)
                    variant.kernel(interpreted())[grid](of_rows, of_tiles, *arguments)

                return run

        return Kernel()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        found.uploads += 1
        return tensor

    monkeypatch.setattr(pack_module, "runs_kernels", lambda _: True)
    monkeypatch.setattr(device_module, "compiled", compiled)
    monkeypatch.setattr(device_module, "current_target", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: found.stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.captures)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: found.recorded.append((tensor.data_ptr(), stream[0]))
    )
    return found


def table_of(tensors: list[torch.Tensor], **options: Any) -> tuple[Table, int]:
    """Two rows of each tensor, from its second column on, and all of the transposed first."""
    turned = [*tensors, tensors[0].T]
    count = len(tensors)
    starts = np.array([[1, 1]] * count + [[0, 0]])
    shapes = np.array([[2, n - 1] for n in (t.shape[1] for t in tensors)] + [list(turned[-1].shape)])
    boxes, nbytes = boxes_in_order(turned, np.arange(count + 1), starts, shapes)
    return Table(boxes, **options), nbytes


def expected(tensors: list[torch.Tensor], table: Table, nbytes: int) -> torch.Tensor:
    result = torch.zeros(nbytes, dtype=torch.uint8)
    reference.pack([*tensors, tensors[0].T], table, [result])
    return result


@pytest.mark.parametrize("multiprocessors", [None, 2])
def test_a_table_is_uploaded_once_and_again_when_a_tensor_has_moved(log: Log, multiprocessors: int | None) -> None:
    tensors = [torch.randn(20, 33), torch.randn(16, 1000).to(torch.bfloat16)]
    table, nbytes = table_of(tensors, multiprocessors=multiprocessors)
    for uploads in (1, 1):
        out = torch.zeros(nbytes, dtype=torch.uint8)
        pack([*tensors, tensors[0].T], table, out)
        require_equal(out, expected(tensors, table, nbytes), "packed")
        assert log.uploads == uploads
    assert multiprocessors is None or max(log.grids) <= (multiprocessors, 1, 1)
    assert len(log.grids) == 4, "one launch for what keeps its order and one for what does not"
    moved = [tensors[0], tensors[1].clone().neg_()]
    pack([*moved, moved[0].T], table, out)
    assert log.uploads == 2
    require_equal(out, expected(moved, table, nbytes), "after a move")
    backs = [torch.zeros_like(tensor) for tensor in tensors]
    unpack(out, table, [*backs, torch.zeros_like(tensors[0]).T])
    require_equal(backs[1][1:3, 1:], moved[1][1:3, 1:], "unpacked")


def test_one_tensor_may_be_another_at_a_like_address(log: Log) -> None:
    memory = torch.randn(2000)
    first = memory[:600].view(20, 30)
    boxes, nbytes = boxes_in_order([first], np.zeros(1, np.int64), np.array([[2, 4]]), np.array([[10, 20]]))
    table = Table(boxes)
    for tensor, uploads in ((first, 1), (memory[800:1400].view(20, 30), 1), (memory[801:1401].view(20, 30), 2)):
        out = torch.zeros(nbytes // 4)
        pack([tensor], table, out)
        require_equal(out.view(10, 20), tensor[2:12, 4:24], "packed")
        assert log.uploads == uploads
    with pytest.raises(ValueError, match=r"tensor 0 spans 400 bytes, and the table's boxes reach to byte 1416"):
        pack([memory[800:900].view(10, 10)], table, out)


def test_whoever_is_used_on_a_stream_is_recorded_there(log: Log) -> None:
    tensors = [torch.randn(4, 8), torch.randn(4, 8)]
    table, nbytes = table_of(tensors)
    out = torch.zeros(nbytes, dtype=torch.uint8)
    addresses = {out.data_ptr(), *(tensor.data_ptr() for tensor in tensors)}
    pack([*tensors, tensors[0].T], table, out)
    assert addresses < {address for address, _ in log.recorded}, "and the table itself"
    log.stream = Stream(9, [])
    pack([*tensors, tensors[0].T], table, out)
    assert addresses < {address for address, stream in log.recorded if stream == 9}


def test_another_stream_waits_once_for_the_upload_of_the_table(log: Log) -> None:
    tensors = [torch.randn(4, 8)]
    table, nbytes = table_of(tensors)
    out = torch.zeros(nbytes, dtype=torch.uint8)
    first, second, captured = log.stream, Stream(9, []), Stream(11, [])
    for log.stream in (first, second, second, first):
        pack([*tensors, tensors[0].T], table, out)
    assert (first.waited, second.waited) == ([], [7])
    log.stream, log.captures = captured, True
    pack([*tensors, tensors[0].T], table, out)
    assert captured.waited == [], "a capture may not wait for what comes before it"
    log.captures = False
    pack([*tensors, tensors[0].T], table, out)
    assert captured.waited == [7]
    moved = [torch.randn(4, 8)]
    log.stream = second
    pack([*moved, moved[0].T], table, out)
    log.stream = first
    pack([*moved, moved[0].T], table, out)
    assert (first.waited, second.waited) == ([9], [7]), "a new upload is on the stream that needs it first"


def test_an_upload_is_not_captured(log: Log) -> None:
    tensors = [torch.randn(4, 8)]
    table, nbytes = table_of(tensors)
    out = torch.zeros(nbytes, dtype=torch.uint8)
    log.captures = True
    with pytest.raises(RuntimeError, match="pack or unpack once with the same tensors before the capture"):
        pack([*tensors, tensors[0].T], table, out)
    log.captures = False
    pack([*tensors, tensors[0].T], table, out)
    log.captures = True
    pack([*tensors, tensors[0].T], table, out)
    require_equal(out, expected(tensors, table, nbytes), "captured")
