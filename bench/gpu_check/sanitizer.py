"""The kernels under NVIDIA's compute-sanitizer, where it is installed: every access inside of what was allocated.

Packing is compared bit for bit elsewhere; a read behind the end of a tensor would not show there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from bench.gpu_check.kernels import check_random_boxes, check_shifted_runs
from bench.gpu_check.parts import Outcome, Setting

PROGRAM = "compute-sanitizer"
SCENES = 25
ERROR_EXIT_CODE = 9
REFUSED = "Device not supported"
LEAVE_SECONDS = 5.0


def memcheck(setting: Setting) -> Iterator[Outcome]:
    """The part "sanitizer": random boxes in a process of their own under memcheck."""
    program = shutil.which(PROGRAM)
    if program is None:
        yield Outcome("memcheck", None, f"there is no {PROGRAM} on the PATH; it comes with the CUDA toolkit")
        return
    inner = [sys.executable, "-m", "bench.gpu_check.sanitizer", setting.device]
    # One allocation for each tensor: inside of torch's large blocks nothing would be out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # torch asks the driver for much that may fail; only accesses matter here, and only those of this process.
    command = [program, "--tool", "memcheck", "--report-api-errors", "no", "--target-processes", "application-only"]
    command += ["--error-exitcode", str(ERROR_EXIT_CODE), *inner]
    seconds = max(setting.seconds - LEAVE_SECONDS, 0.7 * setting.seconds)
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")
        yield Outcome("memcheck", False, f"{printed}\nnot done after {seconds:.0f} s")
        return
    printed = done.stdout.decode(errors="replace").strip()
    if done.returncode == 0:
        yield Outcome("memcheck", True, f"nothing out of bounds in {SCENES} random scenes")
    elif REFUSED in printed:
        yield Outcome("memcheck", None, f"{PROGRAM} does not work on this machine:\n{printed}")
    else:
        problem = f"exit code {done.returncode}, {ERROR_EXIT_CODE} being that of an access out of bounds"
        yield Outcome("memcheck", False, f"{printed}\n{problem}")


def main(arguments: Sequence[str]) -> None:
    """What runs under the sanitizer."""
    print(check_random_boxes(torch.device(arguments[0]), SCENES))
    print(check_shifted_runs(torch.device(arguments[0]), SCENES))


if __name__ == "__main__":
    main(sys.argv[1:])
