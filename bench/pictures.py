"""Draw the pictures of the README again: ``python -m bench.pictures``. They are committed, and a test compares them."""

from pathlib import Path

from tricomm import Broadcast, Mesh, ShardingSpec, Topology, make_plan
from tricomm.draw import plan_svg, timeline_svg
from tricomm.pipeline import Costs, Limits, TransferCost, tune

FOLDER = Path(__file__).parent / "results"
STAGES, MICROBATCHES = 4, 8


def timeline_picture() -> str:
    """Four stages under the schedule that is tuned for hops as long as a forward."""
    costs = Costs.uniform(STAGES, 1.0, 1.0, 1.0, TransferCost(1.0))
    tuned = tune(lambda _: costs, [MICROBATCHES], limits=Limits())
    return timeline_svg(tuned.timeline)


def plan_picture() -> str:
    """64 MiB from one rank to four hosts of two, along one chain in eight chunks."""
    source = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1 << 24,), "float32")
    destination = ShardingSpec.from_dims(Mesh([[1, 2], [3, 4], [5, 6], [7, 8]], ("host", "device")), ["R"])
    hosts = Topology(("trainer", *(name for name in "abcd" for _ in range(2))))
    return plan_svg(make_plan(source, destination, topology=hosts, strategy=Broadcast(chunk_bytes=8 << 20)))


PICTURES = {"plan.svg": plan_picture, "timeline.svg": timeline_picture}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
