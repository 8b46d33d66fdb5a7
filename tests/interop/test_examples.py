"""The examples that ship run as their first lines say, and end where they should."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.interop.torchrun import output_of_job
from tricomm.examples import change_parallelism

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "tricomm" / "examples").glob("*.py") if path.stem != "__init__")


def output_of(name: str, folder: Path) -> str:
    """What an example prints, started as its docstring says."""
    module = importlib.import_module(f"tricomm.examples.{name}")
    command = re.search(r"^torchrun --nproc-per-node (\d+) -m (\S+)$", str(module.__doc__), re.M)
    assert command is not None
    assert command[2] == module.__name__
    arguments = ("--nproc-per-node", command[1], "-m", module.__name__)
    return output_of_job(*arguments, folder=folder, timeout_seconds=280)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_described(name: str) -> None:
    text = (ROOT / "tricomm" / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    assert f"`{name}.py`" in (ROOT / "tricomm" / "examples" / "README.md").read_text()


def losses_of_one_process() -> list[float]:
    """THE DEFINITION: a run that never changes, with the whole batch."""
    model = change_parallelism.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(2 * change_parallelism.STEPS):
        x, target = change_parallelism.make_batch(step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.processes
def test_training_goes_on_after_a_change_from_4_to_3_ranks_as_if_nothing_had_changed(tmp_path: Path) -> None:
    told = re.findall(r"step (\d+) on (\d) ranks: loss (\S+)", output_of("change_parallelism", tmp_path))
    assert [int(ranks) for _, ranks, _ in told] == [4] * change_parallelism.STEPS + [3] * change_parallelism.STEPS
    for (step, _, found), expected in zip(told, losses_of_one_process(), strict=True):
        assert abs(float(found) - expected) < 1e-10, f"step {step}"


@pytest.mark.processes
def test_what_is_pushed_is_what_the_trainer_has(tmp_path: Path) -> None:
    told = re.findall(r"push (\d), (trainer|server): .* add up to ([\d.]+)", output_of("push_weights", tmp_path))
    totals = {(int(push), side): float(total) for push, side, total in told}
    assert len(totals) == 6
    for push in range(3):
        assert totals[push, "server"] == pytest.approx(totals[push, "trainer"], rel=1e-3)  # bfloat16
        assert push == 0 or abs(totals[push, "trainer"] / totals[push - 1, "trainer"] - 1) > 2e-3, "each push is seen"


@pytest.mark.processes
def test_a_dtensor_crosses_meshes_and_its_gradient_comes_back(tmp_path: Path) -> None:
    told = output_of("two_meshes", tmp_path)
    assert re.findall(r"rank (\d): its gradient is 2 x", "\n".join(sorted(told.splitlines()))) == ["0", "1"]
    assert "rank 4: has (7, 1) of (7, 5)" in told


@pytest.mark.processes
def test_two_towers_learn(tmp_path: Path) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output_of("two_towers", tmp_path))]
    assert losses[0] > 3.0
    assert losses[-1] < 0.1


@pytest.mark.processes
def test_torchs_schedules_train_over_unequal_meshes(tmp_path: Path) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output_of("torch_schedules", tmp_path))]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
