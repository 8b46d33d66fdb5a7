"""Everything that needs a GPU, in one command: ``make gpu-check``, or ``python -m bench.gpu_check [--json PATH]``.

Parts run one after the other; the last thing printed is one line a check. The exit status is 1 if one failed, and 2
if there is no CUDA device, when nothing has been checked.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from bench.gpu_sanitizer import sanitizer_part
from bench.gpu_transport import transport_part
from bench.kernel_check import kernels_part
from bench.overhead import describe_hardware
from bench.parts import Outcome

PARTS: list[Callable[[torch.device], Iterable[Outcome]]] = [kernels_part, sanitizer_part, transport_part]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part, print the table, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="What only a GPU can show.")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where figures go (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} finds no CUDA device here, so NOTHING was checked", file=sys.stderr
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    begin = time.perf_counter()
    outcomes = [outcome for part in PARTS for outcome in part(device)]
    hardware = {**describe_hardware(), "gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    options.json.write_text(
        json.dumps({"hardware": hardware, "checks": [outcome._asdict() for outcome in outcomes]}, indent=2) + "\n"
    )
    seconds = time.perf_counter() - begin
    print(f"\n{hardware['gpu']}, torch {torch.__version__}, {seconds:.0f} s; figures in {options.json}")
    for outcome in outcomes:
        print(f"  {'ok  ' if outcome.passed else 'FAIL'} {outcome.name:<28} {outcome.text}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
