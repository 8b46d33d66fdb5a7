"""Starts the parts, one process each, and writes down what each found before the next one begins.

Nothing of torch or tricomm is imported here: whatever is wrong with them is found in a part, and told.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from bench.gpu_check.parts import HOST, NO_DEVICE, PARTS, Outcome, Part

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL_FACTOR = 4.0
"""Of all limits, as a rehearsal may run on a busy machine of two cores."""
HUNG_SECONDS = 3.0
"""What a part has that is made to hang in a rehearsal."""
TAIL_CHARACTERS = 20_000
"""Of the log, of a part that did not come to its end, in the JSON line."""
SHOWN_LINES = 25
"""Of an error, on the terminal; all of it is in the log."""


@dataclass(frozen=True, slots=True)
class Options:
    """How all parts are run.

    Attributes:
        device: see Setting.
        folder: of the results.
        faults: parts that are made to "crash" or "hang".
        run: when it began, in every line of JSON.
    """

    device: str
    folder: Path
    faults: Mapping[str, str]
    run: str


@dataclass(frozen=True, slots=True)
class Result:
    """What is known of a part.

    Attributes:
        part: which, with the limit that it had.
        status: "passed", "failed", "crashed", "killed at its limit", "told nothing" or "no device".
        seconds: how long it took.
        exit_code: of its process, negative for a signal; None if it was killed at its limit.
        outcomes: of its checks.
        error: the end of its log, if it did not come to its own end.
    """

    part: Part
    status: str
    seconds: float
    exit_code: int | None
    outcomes: tuple[Outcome, ...]
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return self.status == "passed"

    def as_json(self, options: Options) -> dict[str, Any]:
        """A line of the results."""
        return {
            "run": options.run,
            "rehearsal": options.device == "cpu",
            "device": options.device,
            "part": self.part.name,
            "status": self.status,
            "seconds": round(self.seconds, 2),
            "limit_seconds": self.part.limit_seconds,
            "exit_code": self.exit_code,
            "outcomes": [outcome._asdict() for outcome in self.outcomes],
            "error": self.error,
        }

    def lines(self) -> Iterator[str]:
        """Its lines of the last table."""
        marks = {True: "ok  ", False: "FAIL", None: "skip"}
        for outcome in self.outcomes:
            last = outcome.text.strip().splitlines()[-1] if outcome.text.strip() else ""
            yield f"  {marks[outcome.passed]} {self.part.name + ': ' + outcome.name:<44} {last}"
        if self.status not in ("passed", "failed"):
            how = f"exit code {self.exit_code}" if self.exit_code is not None else "of all its processes"
            yield f"  FAIL {self.part.name:<44} {self.status} after {self.seconds:.0f} s ({how})"


def run_part(part: Part, options: Options, cwd: Path, log: IO[bytes]) -> Result:
    """Run a part in a process group of its own, and end all of that when it is done or its time is over."""
    fault = options.faults.get(part.name)
    log.write(f"\n==== {part.name}: {part.limit_seconds:.0f} s at most\n".encode())
    log.flush()
    begin_of_log = log.tell()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        report = Path(directory) / "report"
        command = [sys.executable, "-m", "bench.gpu_check.child", part.name, "--device", options.device]
        command += ["--seconds", str(part.limit_seconds), "--report", str(report)]
        command += ["--fault", fault] if fault else []
        begin = time.monotonic()
        # A group, not a session: whoever ends the session ends these too.
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(part.limit_seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - begin
        outcomes = tuple(_read(report))
    log.seek(0, os.SEEK_END)
    status = _status(code, outcomes)
    error = "" if status in ("passed", "failed") else _tail(Path(log.name), begin_of_log)
    return Result(part, status, seconds, code, outcomes, error)


def _read(report: Path) -> Iterator[Outcome]:
    for line in report.read_text().splitlines() if report.exists() else ():
        with suppress(json.JSONDecodeError):  # the last line, if the process ended in the middle of it
            yield Outcome(**json.loads(line))


def _status(code: int | None, outcomes: Sequence[Outcome]) -> str:
    if code is None:
        return "killed at its limit"
    if code == NO_DEVICE:
        return "no device"
    if code:
        return "crashed"
    if not outcomes:
        return "told nothing"
    return "failed" if any(outcome.passed is False for outcome in outcomes) else "passed"


def _tail(log: Path, begin: int) -> str:
    """What a part printed, or the end of it."""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")[-TAIL_CHARACTERS:]


def working_folder(root: Path) -> Path:
    """Where ``import tricomm.kernels`` works: the checkout, or one of links if it lost its own link on the way here."""
    if (root / "tricomm" / "kernels" / "jit.py").exists():
        return root
    folder = root / "build" / "gpu-check"
    package = folder / "tricomm"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {package / path.name: path for path in (root / "tricomm").iterdir() if path.name != "kernels"}
    wanted |= {package / "kernels": root / "kernels", folder / "bench": root / "bench"}
    for link, target in wanted.items():
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return folder


def chosen_parts(names: Sequence[str], is_long: bool) -> tuple[Part, ...]:
    """The parts to run, HOST before all; without names those of a pass.

    Raises:
        SystemExit: there is no part of such a name.
    """
    known = [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise SystemExit(f"gpu-check: no part {name!r}; the parts are {', '.join(known)}")
    chosen = [part for part in PARTS if (part.name in names if names else part.is_long == is_long)]
    return (HOST, *(part for part in chosen if part is not HOST))


def run_all(parts: Sequence[Part], options: Options) -> list[Result]:
    """Run the parts in order, appending to the results after each.

    A part may have more than its limit if those before left time over, at most twice as much: together they never take
    longer than their limits.
    """
    cwd = working_folder(ROOT)
    options.folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    left, factor = 0.0, REHEARSAL_FACTOR if options.device == "cpu" else 1.0
    with (options.folder / "gpu_check.log").open("ab") as log, (options.folder / "gpu_check.jsonl").open("a") as lines:
        for part in parts:
            share = factor * part.limit_seconds
            is_hung = options.faults.get(part.name) == "hang"
            limit = HUNG_SECONDS if is_hung else min(2 * share, share + left)
            result = run_part(replace(part, limit_seconds=limit), options, cwd, log)
            left = max(0.0, left + share - result.seconds)
            lines.write(json.dumps(result.as_json(options)) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            results.append(result)
            _show(result)
            if result.status == "no device":
                break
    return results


def _show(result: Result) -> None:
    """Tell how a part ended, and what was wrong as far as it fits."""
    print(f"{result.part.name:<12} {result.status:<20} {result.seconds:5.1f} s", flush=True)
    wrong = [outcome.text for outcome in result.outcomes if outcome.passed is False]
    for text in (*wrong, result.error):
        for line in text.strip().splitlines()[-SHOWN_LINES:]:
            print(f"    {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table; 0 if all passed, 1 if one did not, 2 if there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="What only a GPU can show.")
    known = ", ".join(part.name for part in PARTS)
    parser.add_argument("--part", action="append", default=[], help=f"of {known}; again for another one")
    parser.add_argument("--long", action="store_true", help="the second pass: what takes longer")
    parser.add_argument("--device", default="cuda:0", help="cpu rehearses the parts, on small sizes (%(default)s)")
    parser.add_argument("--fault", action="append", default=[], metavar="PART=crash|hang", help="in a rehearsal")
    given = parser.parse_args(arguments)
    faults = dict(fault.split("=", 1) for fault in given.fault)
    if faults and given.device != "cpu":
        parser.error("--fault is for a rehearsal; add --device cpu")
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results").resolve()
    options = Options(given.device, folder, faults, datetime.now(UTC).isoformat(timespec="seconds"))
    parts = chosen_parts(given.part, given.long)
    if given.device == "cpu":
        print(
            "gpu-check: a REHEARSAL on the CPU. No kernel, no NCCL and no GPU takes part, and no figure means anything."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a part's processes go too
    results = run_all(parts, options)
    if results[-1].status == "no device":
        print(
            f"gpu-check: NOTHING was checked: {results[-1].error.strip()}. Run it where torch sees a CUDA device, or "
            "rehearse it with --device cpu (make gpu-check DEVICE=cpu)",
            file=sys.stderr,
        )
        return 2
    seconds = sum(result.seconds for result in results)
    passed = all(result.passed for result in results)
    outcome = "all parts passed" if passed else "NOT all parts passed"
    print(f"\n{outcome} in {seconds:.0f} s; whole errors and figures are in {folder}/gpu_check.*")
    for result in results:
        print(*result.lines(), sep="\n")
    return 0 if passed else 1
