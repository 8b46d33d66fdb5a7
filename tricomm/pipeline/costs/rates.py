"""Transfers that share links: the part of its full speed at which each of them moves."""

from collections.abc import Sequence

from tricomm.pipeline.costs.costs import Load

ROUNDING = 1e-12
"""Parts of a link or of a transfer that are no more than rounding."""


def fair_rates(loads: Sequence[Sequence[Load]]) -> list[float]:
    """The speed of each transfer, 1 being that of one that has all that it loads for itself.

    What each takes of the link that it loads most rises together (max-min), until one moves at full speed or a link
    is full; those on a full link keep what they have.
    """
    peaks = [max(load for _, load in one) for one in loads]
    free = {name: 1.0 for one in loads for name, _ in one}
    rates = [0.0] * len(loads)
    rising = set(range(len(loads)))
    while rising:
        slopes: dict[str, float] = {}
        for index in rising:
            for name, load in loads[index]:
                slopes[name] = slopes.get(name, 0.0) + load / peaks[index]
        step = min(free[name] / slope for name, slope in slopes.items())
        step = min(step, *(peaks[index] * (1 - rates[index]) for index in rising))
        for name, slope in slopes.items():
            free[name] -= step * slope
        for index in rising:
            rates[index] += step / peaks[index]
        full = {name for name in slopes if free[name] <= ROUNDING}
        rising -= {
            index for index in rising if rates[index] >= 1 - ROUNDING or any(name in full for name, _ in loads[index])
        }
    return rates
