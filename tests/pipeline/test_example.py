"""The example of what models of a stranger have beside layers: it runs, learns and saves."""

import re
from pathlib import Path

import pytest
import torch

from tests.interop.test_examples import output_of
from tricomm.examples import masked_pipeline


@pytest.mark.processes
def test_the_example_learns_and_saves_each_stage(tmp_path: Path) -> None:
    assert len(Path(masked_pipeline.__file__).read_text().splitlines()) < 80
    printed = output_of("masked_pipeline", tmp_path)
    told = re.search(r"loss ([\d.]+), (\d+)% right", printed)
    assert told is not None, printed
    assert float(told[1]) < 2.0, "it begins at about 3.9"
    for rank, kind in enumerate((masked_pipeline.Encoder, masked_pipeline.Decoder)):
        kind().load_state_dict(torch.load(tmp_path / f"stage{rank}.pt"))
