"""The demo on a small file: every element arrives, there and back."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tricomm import demo
from tricomm.launch import RankError, Ranks


@pytest.mark.processes
def test_the_demo_moves_a_file_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "attention.output.dense.weight": torch.randn(24, 16),
        "intermediate.dense.weight": torch.randn(32, 24),
        "intermediate.dense.bias": torch.tensor([float("nan"), 1.0, -0.0, 2.5] * 8),
        "LayerNorm.weight": torch.ones(24),
        "positions": torch.arange(7),
    }
    tensors |= {f"self.{part}.weight": torch.randn(16, 24) for part in ("query", "key", "value")}
    save_file(tensors, tmp_path / "small.safetensors")
    demo.run_demo(str(tmp_path / "small.safetensors"))
    told = capsys.readouterr().out
    assert told.startswith("small.safetensors: 8 tensors; (dp=2 tp=2: ranks 0-3) -> (tp=4: ranks 4-7) and back")
    trainer, server = told.splitlines()[1:3]
    assert trainer.split(": ")[1] == (
        "float32, int64; 5 cut by dim 0 over tp, 2 whole on every rank, 1 cut by dim 1 over tp"
    )
    assert server.split(": ")[1].strip().startswith("bfloat16, int64; ")
    assert "The cast to bfloat16 changes no element by more than 0.3" in told
    # The server holds matrices once and vectors four times; of the trainer's two copies each, every rank has its own.
    matrices, vectors, halves = 24 * 16 + 32 * 24 + 3 * 16 * 24, 24 + 7, 32
    there, back = matrices + 4 * (halves + vectors), 2 * matrices + 2 * halves + 4 * vectors
    assert f"All {2 * there + back:,} elements on all ranks equal the file's" in told
    rows = [line for line in told.splitlines() if " -> " in line][1:]
    assert [row.split("  ")[0] for row in rows] == [
        "trainer -> server",
        "server -> trainer",
        "trainer -> server, fused",
    ]
    # One call, isend and irecv, gather and broadcast and slice: seconds of each, and what part of the others' is ours.
    assert all(re.search(r"(\d\.\d{3}) +\d\.\d\d" + 2 * r" +(\d\.\d{3}) +\d+\.\d\dx" + "$", row) for row in rows)


@pytest.mark.processes
@pytest.mark.parametrize("way", ["PointToPoint", "GatherBroadcastSlice"])
def test_what_is_written_by_hand_is_compared_as_well(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that moves nothing is not timed: it is an error."""
    save_file({"intermediate.dense.weight": torch.randn(32, 24)}, tmp_path / "small.safetensors")
    directions = demo.directions_of(tmp_path / "small.safetensors")
    with Ranks(8) as ranks:
        ranks.start(_without, way, str(tmp_path / "small.safetensors"), directions)
        with pytest.raises(RankError, match=r"intermediate\.dense\.weight on rank 4 differs from the file by"):
            ranks.collect([4])  # the trainer waits for the others


def _without(rank: int, way: str, path: str, directions: list[demo.Direction]) -> list[demo.Report]:
    getattr(demo, way).__call__ = lambda *_: None
    return demo.measure(rank, path, directions)


def test_the_error_of_a_cast_is_a_part_of_the_element() -> None:
    before = torch.tensor([1.0, 0.0, float("inf"), 1 + 2**-8, -3.0])
    assert demo.relative_error(before, before.bfloat16()) == pytest.approx(2**-8 / (1 + 2**-8))
    assert demo.relative_error(before, before) == 0.0
    assert demo.relative_error(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)) == 0.0
    assert demo.relative_error(torch.arange(3), torch.arange(3, dtype=torch.int32)) == 0.0
