"""The process of one part: ``python -m bench.gpu_check.child NAME --device D --seconds S --report PATH``.

Each outcome is appended to the report as soon as it is known, so that a crash loses none. Shortly before the time is
over, the stacks of all threads are printed: that is where it hangs.
"""

import argparse
import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu_check.parts import NO_DEVICE, PARTS, Outcome, Part, Setting

DUMP_AT = 0.85
"""Of the time: when stacks are printed."""


def outcomes_of(part: Part, setting: Setting) -> Iterator[Outcome]:
    """What the part finds; an error between its checks is a failure of its own."""
    module, _, function = part.function.partition(":")
    try:
        yield from getattr(importlib.import_module(f"bench.gpu_check.{module}"), function)(setting)
    except KeyboardInterrupt:
        raise
    except BaseException:
        yield Outcome("the part itself", False, traceback.format_exc())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part; 0 if it came to its end, whatever it found."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.child")
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--fault", choices=["crash", "hang"], help="in a rehearsal: after the first outcome; at once")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    faulthandler.dump_traceback_later(DUMP_AT * options.seconds)
    if options.fault == "hang":
        time.sleep(1e6)
    if not options.device.startswith("cpu"):
        import torch

        if not torch.cuda.is_available():
            print(f"torch {torch.__version__} finds no CUDA device")
            return NO_DEVICE
        torch.cuda.set_device(options.device)
    part = next(part for part in PARTS if part.name == options.part)
    with options.report.open("a") as report:
        for outcome in outcomes_of(part, Setting(options.device, options.seconds)):
            print(f"{outcome.name}: {outcome.text}", flush=True)
            report.write(json.dumps(outcome._asdict()) + "\n")
            report.flush()
            if options.fault == "crash":
                os.abort()
    return 0


if __name__ == "__main__":
    sys.exit(main())
