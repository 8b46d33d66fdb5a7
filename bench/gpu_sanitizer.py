"""The kernels under NVIDIA's compute-sanitizer, where it is installed: every access inside of what was allocated.

Packing is compared bit for bit elsewhere; a read behind the end of a tensor would not show there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from bench.kernel_check import check_random_boxes
from bench.parts import Outcome

PROGRAM = "compute-sanitizer"
SCENES = 25
ERROR_EXIT_CODE = 9
TIMEOUT_SECONDS = 180


def sanitizer_part(device: torch.device) -> Iterator[Outcome]:
    """Random boxes in a process of their own under memcheck."""
    name = "kernels: compute-sanitizer"
    program = shutil.which(PROGRAM)
    if program is None:
        yield Outcome(name, True, f"NOT RUN: there is no {PROGRAM} on the PATH; it comes with the CUDA toolkit")
        return
    inner = [sys.executable, "-m", "bench.gpu_sanitizer", str(device)]
    # One allocation for each tensor: inside of torch's large blocks nothing would be out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", "memcheck", "--error-exitcode", str(ERROR_EXIT_CODE), *inner]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield Outcome(name, False, f"not done after {TIMEOUT_SECONDS} s")
        return
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    problem = f"exit code {done.returncode}, {ERROR_EXIT_CODE} being that of an access out of bounds; see above"
    yield Outcome(name, not done.returncode, problem if done.returncode else f"memcheck of {SCENES} random scenes")


def main(arguments: Sequence[str]) -> None:
    """What runs under the sanitizer."""
    print(check_random_boxes(torch.device(arguments[0]), SCENES))


if __name__ == "__main__":
    main(sys.argv[1:])
