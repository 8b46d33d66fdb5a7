"""Every model, number of stages, schedule and kind of queues, 20 steps each: prints the largest errors.

Not part of ``make test``:

python -m tests.pipeline.matrix [--steps 20]
"""

import argparse
import time

from tests.cases import RANKS
from tests.pipeline.test_executor import MESHES, MODELS, SCHEDULES, case_of, errors_of, turned
from tricomm.launch import Ranks
from tricomm.pipeline import Queues

QUEUES = (Queues.PER_CHANNEL, Queues.PER_DIRECTION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    print(f"largest relative error over {steps} steps and all ranks, float64; seconds on this machine")
    print(f"{'model':14} {'stages':>6} {'schedule':14} {'queues':14} {'loss':>9} {'gradient':>9} {'seconds':>8}")
    with Ranks(RANKS, timeout_seconds=300) as ranks:
        for name in MODELS:
            for pipeline_ranks in MESHES:
                for kind, queues in ((kind, queues) for kind in SCHEDULES for queues in QUEUES):
                    schedule, meshes = case_of(name, pipeline_ranks, kind)
                    if queues is Queues.PER_DIRECTION:
                        schedule = turned(schedule)
                    began = time.monotonic()
                    errors = errors_of(ranks, name, (schedule,), meshes, steps, queues=queues)
                    seconds = time.monotonic() - began
                    loss, gradient = (max(pair[index] for pair in errors) for index in (0, 1))
                    what = f"{name:14} {len(meshes):6} {kind:14} {queues.name:14}"
                    print(f"{what} {loss:9.1e} {gradient:9.1e} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
