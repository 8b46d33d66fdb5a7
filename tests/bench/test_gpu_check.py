"""Every part of gpu-check does on the CPU what it is to do on a GPU, as far as that can be."""

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu_check import host, kernels, local, runner, throughput, transport
from bench.gpu_check.parts import HOST, PARTS, Outcome, Part, Setting, guarded
from bench.gpu_check.uses import multicast, overlap, pipeline
from tricomm import Mesh, Replicate, ShardingSpec
from tricomm.kernels import reference
from tricomm.kernels.pack import Table
from tricomm.launch import Ranks

HERE = Setting("cpu", 60.0)
FIRST_PASS_SECONDS = 240
LONGEST_COMMAND_SECONDS = 600


@pytest.mark.parametrize(
    ("part", "skipped"),
    [
        (kernels.boxes, set()),
        (kernels.casts, set()),
        (kernels.graphs, {"graphs"}),
        (local.moves, set()),
        (throughput.some, set()),
        (throughput.every, set()),
    ],
)
def test_a_part_finds_nothing_wrong(part: Callable[[Setting], Iterator[Outcome]], skipped: set[str]) -> None:
    outcomes = list(part(HERE))
    assert [outcome for outcome in outcomes if outcome.passed is False] == []
    assert {outcome.name for outcome in outcomes if outcome.passed is None} == skipped
    assert len({outcome.name for outcome in outcomes}) == len(outcomes)


def test_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "commit", lambda: "abc1234")
    hardware = {"torch": torch.__version__, "python": "3.12", "cores": 2}
    monkeypatch.setattr(host, "describe_hardware", lambda: hardware)  # it asks a program for the processor
    software, package, card = host.versions(HERE)
    assert software.figures["torch"] == torch.__version__
    assert {"triton", "nccl", "cuda", "python", "numpy", "commit"} <= software.figures.keys()
    assert package.passed
    assert card.passed is None


def test_the_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="A card", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(shutil, "which", lambda _: "nvidia-smi")
    said = SimpleNamespace(stdout="A card, 580.1, 81559 MiB, P0, 345 MHz, 2619 MHz, 30\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    text, figures = host.card(torch.device("cpu"))
    assert text == "A card, 80 GiB, 132 multiprocessors, driver 580.1"
    assert figures["capability"] == "9.0"


def test_the_eight_cases_of_throughput_are_there() -> None:
    assert [outcome.name for outcome in throughput.some(HERE)] == list(throughput.SOME)
    assert len(throughput.SOME) == 8


def test_a_way_that_torch_does_not_have_hides_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise NotImplementedError("not implemented for 'Float8_e4m3fn'")

    monkeypatch.setattr(torch, "cat", refuses)
    outcome = next(throughput.some(HERE))
    assert outcome.passed
    assert outcome.text.endswith("; torch refuses cat")
    assert "not implemented" in outcome.figures["refused"]["cat"]


def on_some(rank: int, function: Callable[..., Any], size: int, *arguments: Any) -> Any:
    return function(rank, *arguments) if rank < size else None


@pytest.mark.parametrize("name", local.CASES)
def test_the_cases_of_nccl_on_gloo(ranks: Ranks, name: str) -> None:
    assert ranks.run(on_some, transport.moved, 4, local.CASES[name], HERE)[:4] == [True] * 4


def test_the_one_move_on_gloo(ranks: Ranks) -> None:
    specs = [ShardingSpec(Mesh([rank], ("x",)), (Replicate(),), (1024,), "float32") for rank in range(2)]
    assert ranks.run(on_some, transport.one_moved, 2, *specs, HERE)[:2] == [True, True]


def test_the_ways_of_a_multicast_on_gloo(ranks: Ranks) -> None:
    text, figures = multicast.timed(ranks, 3, 1 << 12, HERE)
    ways = [*multicast.WAYS, "NCCL's broadcast"]
    assert [*figures] == [f"{way}, {how}" for way in ways for how in ("queued_seconds", "answered_seconds")]
    assert text.startswith("a chain ")


@pytest.mark.parametrize("name", pipeline.SCHEDULES)
def test_the_pipeline_on_gloo(ranks: Ranks, name: str) -> None:
    found = ranks.run(on_some, pipeline.errors_of, 2, name, pipeline.SCHEDULES[name], HERE)[:2]
    assert max(found) <= pipeline.LARGEST_ERROR


@pytest.mark.parametrize(("found", "expected"), [(torch.tensor([torch.nan]), torch.ones(1)), (None, torch.ones(1))])
def test_what_is_not_a_number_is_no_small_error(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert max(0.0, pipeline.relative_error(found, expected)) > pipeline.LARGEST_ERROR


def test_overlap_in_one_process_is_told() -> None:
    outcome = guarded("one process", partial(overlap.in_one_process, HERE))
    assert outcome.passed, outcome.text
    assert outcome.figures.keys() == {"moving_seconds", "computing_seconds", "together_seconds"}


# ---- what only a device has, on stand-ins


class Graph:
    """A graph that does again what was packed while it was captured."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA graphs on the CPU; the modes of checks for synchronisation that were set."""
    modes: list[str] = []
    open_graphs: list[Graph] = []
    pack = kernels.pack

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        open_graphs.append(graph)
        yield
        open_graphs.clear()

    def packing(*arguments: Any) -> None:
        for graph in open_graphs:
            graph.calls.append(partial(pack, *arguments))
        pack(*arguments)

    monkeypatch.setattr(kernels, "pack", packing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return modes


def test_the_check_of_graphs(captured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a replayed graph packs what is there" in kernels.check_graph(torch.device("cpu"))
    assert captured == ["error", "default"]
    monkeypatch.setattr(Graph, "replay", lambda _: None)
    with pytest.raises(ValueError, match="a replayed graph packs something else"):
        kernels.check_graph(torch.device("cpu"))


# ---- planted faults


def one_byte_off(tensors: list[torch.Tensor], table: Table, out: torch.Tensor) -> None:
    """Pack, and spoil a byte."""
    buffers = [out] if isinstance(out, torch.Tensor) else out
    if table.cast is not None:
        buffers[0].copy_(tensors[0].to(table.cast[1]))
    else:
        reference.pack(tensors, table, buffers)
    if buffers[0].numel():
        buffers[0].view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize("part", [kernels.boxes, kernels.casts, kernels.graphs])
def test_a_wrong_byte_fails(part: Callable[[Setting], Iterator[Outcome]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "pack", one_byte_off)
    assert all(outcome.passed is False for outcome in part(HERE) if outcome.passed is not None)


def test_a_wrong_move_fails() -> None:
    source, destination, strategy = local.CASES["rows to columns"]
    other = local.CASES["reduce"]
    transport_of = local.TRANSPORTS["in groups, as NCCL"][0]

    class Zeros:
        def run(self, *arguments: Any) -> dict[int, torch.Tensor]:
            found = transport_of.run(*arguments)
            found[2].zero_()
            return found

    for case in ((source, destination, strategy), other):
        with pytest.raises(ValueError, match=r"wrong on ranks \[2\]"):
            local.moved(case, Zeros(), False, "cpu")  # type: ignore[arg-type]


# ---- the runner


def test_the_first_pass_takes_four_minutes_at_most_and_the_second_fits_into_a_command() -> None:
    first = [part for part in PARTS if not part.is_long]
    assert runner.chosen_parts([], False) == tuple(first)
    assert sum(part.limit_seconds for part in first) <= FIRST_PASS_SECONDS
    second = runner.chosen_parts([], True)
    assert second[0] == HOST
    assert {*first, *second} == set(PARTS)
    assert sum(part.limit_seconds for part in second) < LONGEST_COMMAND_SECONDS


def test_one_part_is_chosen_by_its_name() -> None:
    assert [part.name for part in runner.chosen_parts(["casts"], False)] == ["versions", "casts"]
    some = runner.chosen_parts(["multicast", "casts"], False)
    assert [part.name for part in some] == ["versions", "casts", "multicast"], "in their order, of either pass"
    assert runner.chosen_parts(["versions"], False) == (HOST,)
    with pytest.raises(SystemExit, match=r"no part 'cast'; the parts are versions, pair, boxes"):
        runner.chosen_parts(["cast"], False)


def raising() -> str:
    raise type("CompilationError", (BaseException,), {})("line 1\nline 2")


def test_whatever_a_check_raises_is_told_whole() -> None:
    outcome = guarded("a check", raising)
    assert outcome.passed is False
    assert outcome.text.startswith("Traceback")
    assert outcome.text.rstrip().endswith("CompilationError: line 1\nline 2")


@pytest.mark.parametrize(
    ("code", "passed", "status"),
    [
        (0, [True, None], "passed"),
        (0, [True, False], "failed"),
        (0, [], "told nothing"),
        (-11, [True], "crashed"),
        (None, [True], "killed at its limit"),
        (77, [], "no device"),
    ],
)
def test_how_a_part_ended(code: int | None, passed: list[bool | None], status: str) -> None:
    outcomes = [Outcome(str(index), value, "text") for index, value in enumerate(passed)]
    assert runner._status(code, outcomes) == status
    result = runner.Result(HOST, status, 1.0, code, tuple(outcomes))
    assert result.passed == (status == "passed")
    shows = any(line.startswith("  FAIL") for line in result.lines())
    assert shows != result.passed


def test_time_that_is_left_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most as much again, and never more than there is."""
    limits: list[float] = []
    took = iter([1.0, 35.0, 5.0, 4.0])

    def ran(part: Part, *_: Any) -> runner.Result:
        limits.append(part.limit_seconds)
        return runner.Result(part, "passed", next(took), 0, (Outcome("a", True, "b"),))

    monkeypatch.setattr(runner, "run_part", ran)
    parts = [Part(str(seconds), "a:b", seconds) for seconds in (20, 30, 10, 10)]
    runner.run_all(parts, runner.Options("cuda:0", tmp_path, {}, "now"))
    assert limits == [20, 49, 20, 20]
    assert len((tmp_path / "gpu_check.jsonl").read_text().splitlines()) == 4


def test_a_checkout_that_lost_its_link_gets_others(tmp_path: Path) -> None:
    assert runner.working_folder(runner.ROOT) == runner.ROOT
    for name in ("tricomm", "kernels", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("")
    (tmp_path / "kernels" / "jit.py").write_text("")
    for _ in range(2):
        folder = runner.working_folder(tmp_path)
        assert folder == tmp_path / "build" / "gpu-check"
        found = {str(path.relative_to(folder)) for path in folder.rglob("*.py")} | {
            str(path.relative_to(folder)) for path in folder.glob("tricomm/*")
        }
        assert found == {"tricomm/tricomm.py", "tricomm/kernels"}
        assert (folder / "tricomm" / "kernels" / "jit.py").is_file()
        assert (folder / "bench" / "bench.py").is_file()
        (folder / "tricomm" / "kernels").unlink()
        (folder / "tricomm" / "kernels").symlink_to(tmp_path / "gone")


def test_scenes_are_the_same_in_every_run() -> None:
    """A scene that failed on a GPU can be looked at later."""
    first, second = (kernels.random_tensor(random.Random(3), torch.device("cpu")) for _ in range(2))
    assert (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)
