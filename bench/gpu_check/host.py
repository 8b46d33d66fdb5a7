"""What all figures belong to: software, driver, card."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.overhead import describe_hardware

ROOT = Path(__file__).resolve().parents[2]
QUERY = "name,driver_version,memory.total,pstate,clocks.sm,clocks.mem,temperature.gpu"


def versions(setting: Setting) -> Iterator[Outcome]:
    """Software first, then the card as torch and as its driver see it."""
    yield guarded("software", software)
    yield guarded("tricomm", tricomm_found)
    if setting.is_rehearsal:
        yield Outcome("card", None, "not looked for in a rehearsal")
        return
    yield guarded("card", lambda: card(torch.device(setting.device)))


def software() -> tuple[str, dict[str, Any]]:
    """Versions of whatever takes part."""
    found = {**describe_hardware(), "kernel": platform.release(), "commit": commit(), "cuda": torch.version.cuda}
    for name in ("triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["nccl"] = None
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    names = ("torch", "cuda", "triton", "nccl", "python", "cores", "commit")
    return ", ".join(f"{name} {found[name]}" for name in names), found


def commit() -> str | None:
    """Of the checkout, if it came with its history."""
    program = shutil.which("git")
    if program is None:
        return None
    command = [program, "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() or None


def tricomm_found() -> str:
    """That the package and its kernels import, and from where."""
    import tricomm
    import tricomm.kernels

    return f"imported from {Path(tricomm.__file__).parent}, its kernels from {Path(tricomm.kernels.__file__).parent}"


def card(device: torch.device) -> tuple[str, dict[str, Any]]:
    """The device, and that it computes."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_nbytes": properties.total_memory,
        "driver": None,
        "nvidia_smi": None,
    }
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=15)
        found["nvidia_smi"] = (done.stdout or done.stderr).strip()
        fields = found["nvidia_smi"].split(", ")
        found["driver"] = fields[1] if len(fields) > 1 else None
    total = int(torch.arange(1 << 20, device=device).sum())
    if total != (1 << 19) * ((1 << 20) - 1):
        raise ValueError(f"the sum of 0 to 2**20 - 1 came out as {total}")
    gibibytes = found["memory_nbytes"] / 2**30
    return (
        f"{found['gpu']}, {gibibytes:.0f} GiB, {found['multiprocessors']} multiprocessors, driver {found['driver']}",
        found,
    )
