"""Draw the pictures of the README again: ``python -m bench.pictures``. They are committed, and a test compares them."""

from pathlib import Path

from tricomm.draw import timeline_svg
from tricomm.pipeline import Costs, Limits, TransferCost, tune

FOLDER = Path(__file__).parent / "results"
STAGES, MICROBATCHES = 4, 8


def timeline_picture() -> str:
    """Four stages under the schedule that is tuned for hops as long as a forward."""
    costs = Costs.uniform(STAGES, 1.0, 1.0, 1.0, TransferCost(1.0))
    tuned = tune(lambda _: costs, [MICROBATCHES], limits=Limits())
    return timeline_svg(tuned.timeline)


PICTURES = {"timeline.svg": timeline_picture}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
