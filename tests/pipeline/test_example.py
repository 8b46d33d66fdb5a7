"""The example of what models of a stranger have beside layers: it runs, learns and saves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tricomm.examples import masked_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
def test_the_example_learns_and_saves_each_stage(tmp_path: Path) -> None:
    assert len(Path(masked_pipeline.__file__).read_text().splitlines()) < 80
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", masked_pipeline.__name__],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = re.search(r"loss ([\d.]+), (\d+)% right", done.stdout)
    assert told is not None, done.stdout
    assert float(told[1]) < 2.0, "it begins at about 3.9"
    for rank, kind in enumerate((masked_pipeline.Encoder, masked_pipeline.Decoder)):
        kind().load_state_dict(torch.load(tmp_path / f"stage{rank}.pt"))
