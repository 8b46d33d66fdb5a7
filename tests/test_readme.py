"""What the README says is what happens."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard

import tricomm
from tests.interop.torchrun import output_of_job
from tricomm import Mesh, Shard, ShardingSpec, cli
from tricomm.launch import Ranks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = (ROOT / "tricomm" / "examples" / "README.md").read_text()
BENCHMARKS = (ROOT / "bench" / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def test_the_first_example_runs_and_prints_the_plan_that_is_shown() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert printed.getvalue() == blocks("text")[0]


@pytest.mark.processes
def test_the_job_runs_as_it_stands_there(tmp_path: Path) -> None:
    """As somebody would copy it: into a file, started by torchrun, anywhere."""
    command = re.search(r"Save this as `(\w+\.py)` and start it with `torchrun ([^`]*)`", README)
    assert command is not None
    (tmp_path / command[1]).write_text(blocks("python")[1])
    output = output_of_job(*shlex.split(command[2]), folder=tmp_path, timeout_seconds=120)
    rows = [[0.0] * 3] * 4 + [[1.0] * 3] * 4
    said = [f"rank {rank} has {'nothing' if rank < 2 else rows}" for rank in range(4)]
    assert sorted(output.splitlines()) == said


class Stand:
    """A trainer or a server that has nothing but tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors


PUSH = textwrap.dedent(re.findall(r"^  ```python\n(.*?)^  ```$", README, re.S | re.M)[0])


def push(rank: int) -> bool:
    """Carry out the lines of the README on one rank: half of them make layouts and rules, the last one moves."""
    if rank > 5:
        return True
    names: dict[str, Any] = {"rank": rank, "tricomm": tricomm}
    *before, last = PUSH.splitlines()
    exec("\n".join(before), names)
    source, destination, rules = names["source"], names["destination"], names["trained"].reverse().then(names["served"])
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.randn(spec.shape, generator=generator) for name, spec in source.items()}
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in rules.evaluate(full).items()}
    if rank < 4:
        names["trainer"] = Stand({name: tricomm.local_shard(full[name], spec, rank) for name, spec in source.items()})
        exec(last, names)
        return True
    shards = {name: tricomm.local_shard(wanted[name], spec, rank) for name, spec in destination.items()}
    names["server"] = Stand({name: torch.zeros_like(shard) for name, shard in shards.items()})
    exec(last, names)
    return all(torch.equal(names["server"].tensors[name], shard) for name, shard in shards.items())


def test_a_push_from_torchtitan_to_vllm_takes_ten_lines(ranks: Ranks) -> None:
    assert len([line for line in PUSH.splitlines() if line.strip()]) <= 10
    assert all(ranks.run(push))


def test_the_network_is_told_in_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"tricomm": tricomm}
    exec(textwrap.dedent(re.findall(r"^  ```python\n(.*?)^  ```$", README, re.S | re.M)[1]), names)
    source, destination = (
        ShardingSpec(Mesh(ranks, ("tp",)), (Shard(0),), (8, 6), "float32") for ranks in (range(4), [4, 5])
    )
    options = tricomm.Options(**names["how"]).given()
    chosen = {name: options[name] for name in ("topology", "strategy")}
    assert "over  6 ranks on 2 hosts, a NIC of 50 GB/s" in str(tricomm.make_plan(source, destination, **chosen))


def off_the_mesh(rank: int) -> tuple[Any, ...]:
    """What a rank gets that needs nothing; ranks beyond the second do not call."""
    here, there = (DeviceMesh("cpu", [one]) for one in (0, 1))  # made by all ranks
    if rank > 1:
        return None, {}, 0
    source, destination = (ShardingSpec(Mesh([one], ("x",)), (Shard(0),), (4, 2), "float32") for one in (0, 1))
    tensor = torch.ones(4, 2) if rank == 0 else None
    one = tricomm.reshard(tensor, source, destination)
    many = tricomm.reshard({} if tensor is None else {"w": tensor}, {"w": source}, {"w": destination})
    given = None if tensor is None else DTensor.from_local(tensor, here, [TorchShard(0)], run_check=False)
    moved = tricomm.redistribute(given, there, [TorchShard(0)], source=(here, [TorchShard(0)], (4, 2), torch.float32))
    return one, many, moved.to_local().numel()


def test_off_the_mesh_a_rank_gets_what_it_says(ranks: Ranks) -> None:
    assert "Off the mesh a rank gets None, of many `{}`, or an empty DTensor." in README
    gone, (one, many, count), *_ = ranks.run(off_the_mesh)
    assert gone == (None, {}, 0)
    assert one.shape == many["w"].shape == (4, 2)
    assert count == 8


def test_the_tuning_example_chooses_a_schedule() -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks("python", EXAMPLES)[0], "README.md", "exec"), names)
    assert printed.getvalue().startswith("chosen: ")
    assert names["schedule"].stages == 3


def test_the_plan_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"`python -m tricomm (plan [^`]*)`", README)
    assert command is not None
    cli.main(shlex.split(command[1]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  from  float32[4096/tp, 1024] replicated over dp on (dp=2 tp=2: ranks 0-3)"
    assert lines[3].startswith("  over  8 ranks on 4 hosts, a NIC of 50 GB/s on each, 200 GB/s within a host; latency")
    assert "assumed; say otherwise with --hosts" in lines[3]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ([], "8 ranks on 8 hosts, a NIC of 12.5 GB/s on each; latency 20 us (assumed"),
        (["--hosts", "3"], "8 ranks on 3 hosts"),
        (["--devices", "8", "--nic", "1e9"], "8 ranks on 1 host, a NIC of 1 GB/s"),
        (["--hosts", "2", "--devices", "4", "--nic", "25e9"], "8 ranks on 2 hosts, a NIC of 25 GB/s on each, 200 GB/s"),
    ],
)
def test_the_plan_command_says_which_network_it_plans_for(network, said, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "--shape", "64,64", "--source", "2x2", "S1 R", "--destination", "4", "R S0", *network])
    over = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  over  "))
    assert said in over
    assert ("assumed" in over) == (len(network) < 6)


PLAN = ["plan", "--shape", "8", "--source", "2", "S0", "--destination", "2", "R"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["plan", "--shape", "8", "--source", "2", "X", "--destination", "2", "R"], "entry 'X'"),
        (["plan", "--shape", "8,a", "--source", "2", "R", "--destination", "2", "R"], "--shape '8,a' is not a list"),
        ([*PLAN, "--svg", "/nowhere/out.svg"], "--svg /nowhere/out.svg cannot be written (No such file or directory)"),
        ([*PLAN, "--svg", "out.png"], "write it to out.svg and convert that"),
        (["plan", "--shape", "8", "--source", "2x", "R", "--destination", "0", "R"], "mesh '0' has no size"),
        (["plan", "--shape", "8", "--source", "tp=", "R", "--destination", "2", "R"], "mesh 'tp=' has no size"),
        ([*PLAN, "--hosts", "2", "--devices", "1"], "are places for 2 ranks, and the meshes have 4"),
        ([*PLAN, "--devices", "0"], "--devices 0 must be at least 1"),
        ([*PLAN, "--nic", "50"], "is in bytes per second, and no NIC is that slow; write 50e9"),
        (["simulate", "--schedule", "eager", "--activations", "2"], "--activations limits tuned schedules"),
        (["simulate", "--schedule", "gpipe", "--depth", "2"], "--depth is of eager and zero-bubble, and this is gpipe"),
        (["simulate", "--svg", "/nowhere/out.svg"], "cannot be written (No such file or directory)"),
        (["simulate", "--svg", "out.png"], "write it to out.svg and convert that"),
        (["demo", "--checkpoint", "/nowhere"], "/nowhere is not a file"),
        (["demo", "--checkpoint", __file__], "is not a .safetensors file"),
    ],
)
def test_a_wrong_command_says_why(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.processes
def test_the_module_is_the_command() -> None:
    words = ["plan", "--shape", "8", "--source", "2", "S0", "--destination", "2", "R"]
    shown = subprocess.check_output([sys.executable, "-m", "tricomm", *words], text=True, cwd=ROOT)
    assert shown.startswith("reshard\n")
    words[-1] = "X"
    done = subprocess.run(
        [sys.executable, "-m", "tricomm", *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tricomm: ")
    assert "Traceback" not in done.stderr


def test_the_targets_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_public_name_has_a_docstring() -> None:
    import tricomm

    for name in tricomm.__all__:
        assert getattr(tricomm, name).__doc__, name


@pytest.mark.processes
def test_a_reader_that_has_had_enough_ends_the_command_quietly() -> None:
    words = ["plan", "--shape", "4096", "--source", "64", "S0", "--destination", "63", "S0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tricomm", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.close()
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (1, "")


EXAMPLE = "tricomm.examples.train_pipeline"


def test_the_pipeline_excerpt_is_from_the_example() -> None:
    example = "".join((ROOT / f"{EXAMPLE.replace('.', '/')}.py").read_text().split())
    excerpt = blocks("python")[2]
    for line in ("Executor(schedule, stages, {(0, 1)", "EdgeTensor(whole, parts)", "eager_one_f_one_b(2, MICROBATCHES"):
        assert line in excerpt
        assert "".join(line.split()) in example


@pytest.mark.processes
def test_the_pipeline_example_trains() -> None:
    assert f"-m {EXAMPLE}" in README
    output = output_of_job("--nproc-per-node", "3", "-m", EXAMPLE, folder=ROOT, timeout_seconds=120)
    losses = {
        (int(step), int(rank)): float(loss)
        for step, rank, loss in re.findall(r"step (\d+), rank (\d): loss of its part ([\d.]+)", output)
    }
    assert {rank for _, rank in losses} == {1, 2}
    assert all(losses[19, rank] < losses[0, rank] for rank in (1, 2))
    assert re.search(r"^\(StageCost\(forward_seconds=.*\nchosen: ", output, re.M)


@pytest.mark.parametrize("package", ["safetensors", "tqdm"])
def test_the_demo_names_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "tricomm.demo", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"tricomm: the demo needs the package {package}, which comes with tricomm's extra 'demo'")
    assert "pip install -e '.[demo]'" in told
    assert "`demo`" in README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_it_links_to_the_examples() -> None:
    assert "](tricomm/examples/README.md)" in README
    assert "\n## Choose a schedule\n" in EXAMPLES


SAID = re.findall(r"^\| (\*.*?) \| (`\w+`|torch's) \| (.*?) \|$", EXAMPLES, re.M)


def texts_of(path: Path) -> str:
    """What a file says, its pieces of text put together and a line for each value in them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n\n".join(found)


def test_the_errors_that_it_lists_are_raised() -> None:
    assert len(SAID) > 25
    sources = {path: texts_of(path) for path in (ROOT / "tricomm").rglob("*.py")}
    for phrase, error, remedy in SAID:
        pieces = re.findall(r"\*([^*]+)\*", phrase)
        where = [path for path, text in sources.items() if all(piece in text for piece in pieces)]
        assert where, f"nothing says {pieces}"
        assert error == "torch's" or hasattr(tricomm, error.strip("`"))
        assert remedy


def test_the_files_that_it_names_exist() -> None:
    for text, folder in ((README, ROOT), (BENCHMARKS, ROOT / "bench"), (EXAMPLES, ROOT / "tricomm" / "examples")):
        for target in re.findall(r"\]\(([^):#]+)", text) + re.findall(r"`(results/[a-z_]+\.\w+)`", text):
            assert (folder / target).exists(), target


def test_the_benchmarks_that_it_names_exist() -> None:
    for name in set(re.findall(r"python -m (bench[\w.]*)", README + BENCHMARKS)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
